"""Cartridges - Lightweight and General-Purpose Long Context Representations via Self-Study.
Eyuboglu et al., 2025, https://arxiv.org/abs/2506.06266, section 3.

    attention over [P_k, K], [P_v, V] in every layer      P = [F, T]: (tokens, layers * 2 * dim)
    F: the first tokens, frozen (attention sinks); T: trained. Best begun from the cache of a text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import read_weights, serialiser
from ..config import PeftConfig, PeftType, PromptLearningConfig
from ..errors import AdapterNameError, CheckpointError, ConfigError
from ..files import write_checkpoint
from ..prompt import EMBEDDINGS, Prompt, check_embeddings


@dataclass
class CartridgeConfig(PromptLearningConfig, method="CARTRIDGE"):
    """Fields of Cartridges."""

    num_frozen_tokens: int = 1  # of the first virtual tokens

    def __post_init__(self):
        super().__post_init__()
        most = math.inf if self.num_virtual_tokens is None else self.num_virtual_tokens
        if not 0 <= self.num_frozen_tokens <= most:
            raise ConfigError(f"`num_frozen_tokens` must be between 0 and {most}, got {self.num_frozen_tokens}.")


class CartridgeEncoder(Prompt, config=CartridgeConfig):
    """Keys and values of all layers for each virtual token, held as they are."""

    gives_cache = True

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        width = config.num_layers * 2 * config.token_dim
        self.num_frozen_tokens = frozen = config.num_frozen_tokens
        self.num_trainable_tokens = config.num_virtual_tokens - frozen
        self.frozen_embedding = nn.Parameter(torch.empty(frozen, width), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(
            torch.empty(self.num_trainable_tokens, width), requires_grad=not config.inference_mode
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all tokens from the standard normal distribution."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    @property
    def weight(self) -> Tensor:
        """All tokens, (tokens, layers * 2 * dim)."""
        frozen = self.frozen_embedding
        return self.trainable_embedding if frozen is None else torch.cat([frozen, self.trainable_embedding])

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        """Has `weight`, as the embedding of other prompts."""
        return _Weight(self)

    def forward(self, prefix_tokens: Tensor) -> Tensor:
        return self.weight.expand(len(prefix_tokens), -1, -1)  # (batch, tokens, layers * 2 * dim)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.load_prompt_embeddings(tensors[EMBEDDINGS])

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take over keys and values (tokens, layers * 2 * dim). Raises `ConfigError` when they do not fit."""
        wanted = (self.num_frozen_tokens + self.num_trainable_tokens, self.trainable_embedding.shape[1])
        check_embeddings(prompt_embeddings, wanted)
        with torch.no_grad():
            if self.frozen_embedding is not None:
                self.frozen_embedding.copy_(prompt_embeddings[: self.num_frozen_tokens])
            self.trainable_embedding.copy_(prompt_embeddings[self.num_frozen_tokens :])


class _Weight(nn.Module):
    def __init__(self, cartridge: CartridgeEncoder):
        super().__init__()
        self.__dict__["cartridge"] = cartridge

    @property
    def weight(self) -> Tensor:
        return self.__dict__["cartridge"].weight


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
    ids = ids[:, :max_length].to(next(model.parameters()).device)
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
    configs = [PeftConfig.from_pretrained(path) for path in adapter_paths]
    for path, config in zip(adapter_paths, configs):
        if config.peft_type is not PeftType.CARTRIDGE:
            raise ConfigError(f"Adapter at '{path}' is not a CARTRIDGE adapter but {config.peft_type.value}.")
        for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if getattr(config, name) != getattr(configs[0], name):
                raise ConfigError(f"Incompatible CARTRIDGE configs: '{path}' differs from the first in '{name}'.")
    parts = []
    for path, config in zip(adapter_paths, configs):
        tensors = read_weights(path)
        if EMBEDDINGS not in tensors or len(tensors[EMBEDDINGS]) != config.num_virtual_tokens:
            raise CheckpointError(f"'{path}' does not hold the tokens that its configuration speaks of.")
        parts.append(tensors[EMBEDDINGS])
    if len({part.shape[1] for part in parts}) > 1:
        raise CheckpointError("The adapters' tokens differ in width.")
    joined = torch.cat(parts)
    config = dataclasses.replace(configs[0], num_virtual_tokens=len(joined))
    tensors = serialiser({EMBEDDINGS: joined}, safe_serialization)
    write_checkpoint(Path(output_path), config.to_json(), tensors, safe_serialization)
