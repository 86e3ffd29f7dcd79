"""Prefixes (Cartridge, prefix tuning) beyond training: begun from a text or a cache, joined from several checkpoints.

A prefix is (tokens, layers * 2 * dim): of every token, for each layer, the keys of all heads, then the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.config import PeftConfig, PeftType
from ...core.errors import AdapterNameError, CheckpointError, ConfigError
from ...core.files import of_one_version, write_checkpoint
from ...core.offload import device_of
from ...core.state import read_weights, serialise
from ...model.prompt import EMBEDDINGS
from .words import message_ids


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as a prompt (tokens, layers * 2 * dim).

    `past_key_values` holds a pair (keys, values) for each layer, each (1, heads, length, head dim): a tuple, or any
    object that gives such pairs when iterated. Raises `ConfigError` for other shapes, or when it holds fewer tokens.
    """
    if hasattr(past_key_values, "to_legacy_cache"):
        past_key_values = past_key_values.to_legacy_cache()
    try:
        tensors = [tensor for layer in past_key_values for tensor in layer[:2]]
    except TypeError:
        kind = type(past_key_values).__name__
        raise TypeError(f"past_key_values must give pairs (keys, values), got a {kind}.") from None
    if not tensors or not all(isinstance(t, Tensor) and t.dim() == 4 and len(t) == 1 for t in tensors):
        raise ConfigError("past_key_values must hold keys and values of shape (1, heads, length, head dim).")
    if len({(t.shape[1], t.shape[3]) for t in tensors}) > 1:
        raise ConfigError("past_key_values has layers of different heads, which no prompt can hold.")
    if (length := min(t.shape[2] for t in tensors)) < num_virtual_tokens or num_virtual_tokens < 1:
        raise ConfigError(f"Cannot take {num_virtual_tokens} tokens from a cache of {length}.")
    first = [t[0, :, :num_virtual_tokens].transpose(0, 1) for t in tensors]  # each (tokens, heads, head dim)
    return torch.stack(first, dim=1).flatten(1).detach()


def _prefix_config(model: Any, adapter_name: str | None) -> tuple[str, Any]:
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise AdapterNameError(f"Adapter {name} not found; this model has {sorted(model.peft_config)}.")
    config = model.peft_config[name]
    if config.peft_type not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        kind = config.peft_type.value
        raise ConfigError(f"Adapter '{name}' must be a CARTRIDGE or PREFIX_TUNING adapter, not {kind}.")
    if getattr(config, "prefix_projection", False):
        raise ConfigError("A prefix with `prefix_projection=True` cannot be initialised from a cache.")
    return name, config


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Begin a prefix (Cartridge, or prefix tuning without projection) with the first tokens of a cache.

    Returns what was loaded, (tokens, layers * 2 * dim). Raises `ConfigError` when it does not fit the adapter.
    """
    name, config = _prefix_config(model, adapter_name)
    count = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    embeddings = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    model.prompt_encoder[name].load_prompt_embeddings(embeddings)
    return embeddings


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Begin a prefix with the cache that the base model makes of the first tokens of `text`.

    With a chat template the text is a system message. See `initialize_kv_prefix_from_past_key_values`.
    """
    name, _ = _prefix_config(model, adapter_name)
    ids = message_ids(tokenizer, text, use_chat_template, max_length).to(device_of(model))
    with model.disable_adapter():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=output.past_key_values, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Write one Cartridge that holds the tokens of several saved ones, one after the other.

    Of the frozen tokens only those of the first stay frozen. Raises `ConfigError` when fewer than two are given or they
    are for different models.
    """
    if len(adapter_paths) < 2:
        raise ConfigError(f"Need at least 2 adapters to compose, got {len(adapter_paths)}.")
    both = lambda path: of_one_version(path, None, lambda: (PeftConfig.from_pretrained(path), read_weights(path)))
    found: list[tuple[Any, dict[str, Tensor]]] = [both(path) for path in adapter_paths]
    configs = [config for config, _ in found]
    for path, config in zip(adapter_paths, configs):
        if config.peft_type is not PeftType.CARTRIDGE:
            raise ConfigError(f"Adapter at '{path}' is not a CARTRIDGE adapter but {config.peft_type.value}.")
        for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if getattr(config, name) != getattr(configs[0], name):
                raise ConfigError(f"Incompatible CARTRIDGE configs: '{path}' differs from the first in '{name}'.")
    parts = []
    for path, (config, tensors) in zip(adapter_paths, found):
        if EMBEDDINGS not in tensors or len(tensors[EMBEDDINGS]) != config.num_virtual_tokens:
            raise CheckpointError(f"'{path}' does not hold the tokens that its configuration speaks of.")
        parts.append(tensors[EMBEDDINGS])
    if len({part.shape[1] for part in parts}) > 1:
        raise CheckpointError("The adapters' tokens differ in width.")
    joined = torch.cat(parts)
    config = dataclasses.replace(configs[0], num_virtual_tokens=len(joined))
    data = serialise({EMBEDDINGS: joined}, safe_serialization)
    write_checkpoint(output_path, config.to_json(), data, safe_serialization)
