"""Prompt tuning - The Power of Scale for Parameter-Efficient Prompt Tuning.
Lester et al., 2021, https://arxiv.org/abs/2104.08691, section 2.

    model([P, e(x)])            P: (tokens, dim), trained; e(x): the input's embeddings
    parameters                  num_virtual_tokens num_transformer_submodules token_dim
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ...core.config import PromptLearningConfig
from ...core.errors import ConfigError
from ...model.prompt import Prompt
from .words import text_ids, word_vectors


class PromptTuningInit(str, enum.Enum):
    """What the virtual tokens are at the start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig, method="PROMPT_TUNING", optional=("prompt_tuning_init",)):
    """Fields of prompt tuning; a text to begin with needs transformers' tokenizers."""

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None  # for TEXT
    tokenizer_name_or_path: str | None = None  # for TEXT
    tokenizer_kwargs: dict | None = None  # for TEXT

    def __post_init__(self):
        super().__post_init__()
        text = self.prompt_tuning_init == "TEXT"
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if text and not getattr(self, name):
                raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)!r}.")
        if self.tokenizer_kwargs and not text:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


class Begun(Prompt):
    """Virtual tokens (tokens, dim) that begin as the configuration's `prompt_tuning_init` says."""

    reads_words = True

    def __init__(self, config: Any, word_embeddings: Any):
        super().__init__()
        total = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(total, config.token_dim)  # (tokens, dim)
        if config.inference_mode or config.prompt_tuning_init not in ("SAMPLE_VOCAB", "TEXT"):
            return
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, word_embeddings.num_embeddings, (total,))
        else:
            ids = torch.tensor(list(islice(cycle(text_ids(config)), total)))
        vectors = word_vectors(word_embeddings, ids)
        if vectors.shape != self.embedding.weight.shape:
            raise ConfigError(f"`token_dim` is {config.token_dim}, but the words have {vectors.shape[1]} dimensions.")
        self.embedding.weight = nn.Parameter(vectors)


class PromptEmbedding(Begun, config=PromptTuningConfig):
    """Virtual tokens, one row each."""

    def forward(self, indices: Tensor) -> Tensor:
        return self.embedding(indices)
