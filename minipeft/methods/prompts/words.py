"""Words to begin a prompt with: their embeddings, and the tokens of a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...core.offload import device_of


def word_vectors(words: Any, ids: Any, field: str = "ids") -> Tensor:
    """Copies of the embeddings of `ids` (tokens,) in float32, (tokens, dim). Raises `ConfigError` for unknown ids."""
    ids, count = torch.as_tensor(ids, device=device_of(words)), words.weight.shape[0]
    if not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ConfigError(f"{field} must be between 0 and {count - 1}.")
    return words(ids).detach().clone().float()


def text_ids(config: Any) -> list[int]:
    """Token ids of a configuration's `prompt_tuning_init_text`. `trust_remote_code` is never passed on."""
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


def message_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> Tensor:
    """Token ids (1, length) of a text; if the tokenizer has a chat template that is wanted, as a system message."""
    ids = None
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        try:
            ids = tokenizer.apply_chat_template(
                [{"role": "system", "content": text}],
                tokenize=True,
                add_generation_prompt=False,
                return_dict=False,
                return_tensors="pt",
            )
        except (TypeError, ValueError):  # the tokenizer has no template
            ids = None
    if ids is None:
        cut = max_length is not None
        ids = tokenizer(text, return_tensors="pt", truncation=cut, max_length=max_length)["input_ids"]
    return ids[:, :max_length]
