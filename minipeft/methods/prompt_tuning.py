"""Prompt tuning - The Power of Scale for Parameter-Efficient Prompt Tuning.
Lester et al., 2021, https://arxiv.org/abs/2104.08691, section 2.

    model([P, e(x)])            P: (tokens, dim), trained; e(x): the input's embeddings
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig, _member
from ..errors import ConfigError
from ..prompt import Prompt


class PromptTuningInit(str, enum.Enum):
    """What the virtual tokens are at the start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig, method="PROMPT_TUNING"):
    """Fields of prompt tuning; a text to begin with needs transformers' tokenizers."""

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None  # for TEXT
    tokenizer_name_or_path: str | None = None  # for TEXT
    tokenizer_kwargs: dict | None = None  # for TEXT

    def __post_init__(self):
        super().__post_init__()
        self.prompt_tuning_init = _member(self._inits(), self.prompt_tuning_init, "prompt_tuning_init")
        text = self.prompt_tuning_init == "TEXT"
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if text and not getattr(self, name):
                raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)!r}.")
        if self.tokenizer_kwargs and not text:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")

    @classmethod
    def _inits(cls) -> type[enum.Enum]:
        return PromptTuningInit


class PromptEmbedding(Prompt, config=PromptTuningConfig):
    """Virtual tokens (tokens, dim), one row each."""

    reads_words = True

    def __init__(self, config: Any, word_embeddings: Any):
        super().__init__()
        total = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(total, config.token_dim)  # (tokens, dim)
        if config.inference_mode:
            return
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            self._start_at(word_embeddings, torch.randint(0, word_embeddings.num_embeddings, (total,)))
        elif config.prompt_tuning_init == "TEXT":
            ids = tokenized(config)
            self._start_at(word_embeddings, torch.tensor(list(islice(cycle(ids), total))))

    def _start_at(self, words: Any, ids: Tensor) -> None:
        vectors = words(ids.to(words.weight.device)).detach().clone().float()
        if vectors.shape != self.embedding.weight.shape:
            raise ConfigError(
                f"`token_dim` is {self.embedding.weight.shape[1]}, but the words have {vectors.shape[1]} dimensions."
            )
        self.embedding.weight = nn.Parameter(vectors)

    def forward(self, indices: Tensor) -> Tensor:
        return self.embedding(indices)


def tokenized(config: Any) -> list[int]:
    """Token ids of the text to begin with. `trust_remote_code` is never passed on."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError("prompt_tuning_init='TEXT' needs transformers, to read the tokenizer.") from error
    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens.")
    return ids
