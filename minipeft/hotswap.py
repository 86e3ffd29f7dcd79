"""Putting another LoRA checkpoint into an adapter that is there, in place, so that compiled code stays valid."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapter import variants
from .base import Conv, Conv1D, Linear, lasting
from .checkpoint import Entry, entries_of_model, infer_device, load_peft_weights, strip
from .config import PeftConfig, PeftType
from .errors import AdapterNameError, CheckpointError, ConfigError, MergeError, PeftWarning, UnsupportedFeatureError
from .files import of_one_version
from .layer import Layer
from .targets import pattern_value

MUST_AGREE = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise `ConfigError` unless an adapter of `config1` can take the place of one of `config0`; both must be LoRA."""
    kinds = [PeftType(config.peft_type).value for config in (config0, config1)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}.")
    if config0.peft_type != PeftType.LORA:
        raise UnsupportedFeatureError(f"Hotswapping only supports LORA but {kinds[0]} was passed.")
    for field in MUST_AGREE:
        old, new = getattr(config0, field), getattr(config1, field)
        if old != new:
            raise ConfigError(f"Configs are incompatible: for {field}, {old!r} != {new!r}.")
    if (old := variants(config0)) != (new := variants(config1)):
        raise ConfigError(f"Configs are incompatible: their variants of LoRA are {old} and {new}.")


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put the saved LoRA `model_name_or_path` in the place of adapter `adapter_name`, which keeps its name.

    Further options go to the reading of its configuration and weights. Raises `PeftError`, with nothing changed, when
    the two do not fit; see `check_hotswap_configs_compatible` and `hotswap_adapter_from_state_dict`.
    """
    device = torch_device or infer_device()
    config, weights = of_one_version(
        model_name_or_path,
        kwargs.get("subfolder"),
        lambda: (
            PeftConfig.from_pretrained(model_name_or_path, **kwargs),
            load_peft_weights(model_name_or_path, device, **kwargs),
        ),
    )
    # PEFT: looks at the active adapter, whichever is replaced
    check_hotswap_configs_compatible(model.peft_config.get(adapter_name, model.active_peft_config), config)
    live = {strip(entry.saved): entry.live for entry in _entries(model, adapter_name)}
    state_dict = {live.get(strip(key), key): tensor for key, tensor in weights.items()}
    hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config)


@lasting()
@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Put the tensors of `state_dict`, by live key, in the place of those of adapter `adapter_name`.

    `config` says their rank and scaling. What the new adapter lacks is set to 0. A smaller rank is padded with zeros, a
    larger one takes new memory. Raises `PeftError`, with nothing changed, for keys that the model does not have, for
    shapes that differ otherwise, and when the adapter is merged.
    """
    entries = {entry.live: entry for entry in _entries(model, adapter_name) if parameter_prefix in entry.live}
    if any(adapter_name in layer.merged_adapters for layer in model.modules() if isinstance(layer, Layer)):
        raise MergeError(f"Cannot hot-swap adapter '{adapter_name}' while it is merged; unmerge it first.")
    given = {key.removeprefix("_orig_mod."): tensor for key, tensor in state_dict.items()}
    if unexpected := [key for key in given if key not in entries]:
        raise CheckpointError(f"Hot swapping needs the same layers; unexpected keys found: {', '.join(unexpected)}.")
    new = {key: _resized(entries[key], key, value, adapter_name) for key, value in given.items()}
    for key, entry in entries.items():
        old = entry.tensor
        if key not in new:
            old.zero_()
            continue
        if new[key].shape == old.shape:
            old.copy_(new[key])
        else:
            old.data = new[key].to(old, copy=True)
        assert entry.layer is not None
        _set_scaling(entry.layer, adapter_name, config)


@lasting()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make all LoRA adapters of a model swappable without recompilation; to be called before `torch.compile`.

    The scaling becomes a tensor, and the factors are padded with zeros to `target_rank`, the largest rank to come. In
    `config`, one configuration or several by name, the rank is set to that too. Raises `PeftError`, with nothing
    changed, for a compiled model (unless `check_compiled` says otherwise), without LoRA layers, and for a larger rank.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled == "error":
            raise UnsupportedFeatureError("Call prepare_model_for_compiled_hotswap *before* compiling the model.")
        if check_compiled == "warn":
            warnings.warn("The model is compiled already; it will be compiled again.", PeftWarning)
        elif check_compiled != "ignore":
            raise ConfigError(f"check_compiled must be 'error', 'warn' or 'ignore', got {check_compiled!r}.")
    found = [m for m in model.modules() if isinstance(m, Layer) and m.method == PeftType.LORA]
    if not found:
        raise UnsupportedFeatureError("No LoRA layers found on the model; load the first adapter before this.")
    padded = []
    for layer in found if target_rank is not None else ():
        if type(layer.base) in (Linear, Conv1D, Conv):  # PEFT: no other kind
            for adapter in layer.adapters.values():
                _check_pads(adapter)
                for slot in ("lora_A", "lora_B"):
                    factor = getattr(adapter, slot)
                    padded.append((factor, slot, _padded(layer, factor, slot, target_rank or 0)))
    for layer in found:
        for name, value in layer.scaling.items():
            layer.scaling[name] = torch.as_tensor(value, dtype=torch.float32, device=layer.base.device)
    for factor, slot, weight in padded:
        factor.weight.data = weight
        names = ("out_features", "out_channels") if slot == "lora_A" else ("in_features", "in_channels")
        for name in names:
            if hasattr(factor, name):
                setattr(factor, name, target_rank)
    for one in (config.values() if isinstance(config, dict) else [config]) if config and target_rank else ():
        one.r = target_rank
        one.rank_pattern = dict.fromkeys(one.rank_pattern or {}, target_rank)


def _entries(model: nn.Module, name: str) -> list[Entry]:
    inner = getattr(model, "_orig_mod", model)
    if name not in getattr(inner, "peft_config", {}):
        raise AdapterNameError(f"Adapter {name} not found; this model has {sorted(getattr(inner, 'peft_config', {}))}.")
    return [entry for entry in entries_of_model(inner, name) if entry.layer is not None]


def _set_scaling(layer: Layer, name: str, config: Any) -> None:
    """The scaling that `config` gives this layer, into the tensor that is there if there is one."""
    adapter = layer.adapters[name]
    adapter.r = pattern_value(config.rank_pattern, adapter.path, config.r)
    adapter.lora_alpha = pattern_value(config.alpha_pattern, adapter.path, config.lora_alpha)
    scaling = adapter.lora_alpha / (math.sqrt(adapter.r) if config.use_rslora else adapter.r)
    if isinstance(layer.scaling[name], Tensor):
        layer.scaling[name].fill_(scaling)
    else:
        layer.scaling[name] = scaling


def _resized(entry: Entry, key: str, value: Tensor, name: str) -> Tensor:
    """`value` with the rank of the tensor that it replaces, if that is larger; otherwise as it is."""
    old, groups = entry.tensor, getattr(getattr(entry.layer, "base", None), "leaf", None)
    if value.shape == old.shape:
        return value
    where = [dim for dim in range(value.dim()) if value.dim() == old.dim() and value.shape[dim] != old.shape[dim]]
    rank = 0 if ".lora_A." in key or ".lora_embedding_A." in key else 1
    if where != [rank]:
        raise CheckpointError(f"'{key}' has shape {tuple(value.shape)}, but {tuple(old.shape)} is in its place.")
    if value.shape[rank] > old.shape[rank]:
        return value
    assert entry.layer is not None
    _check_pads(entry.layer.adapters[name])
    return _pad(value, old.shape[rank], rank, getattr(groups, "groups", 1) if rank == 0 else 1)


def _check_pads(adapter: Any) -> None:
    if not adapter.pads:
        raise UnsupportedFeatureError(f"The rank of {adapter!r} cannot be raised: zeros would not stand in its blocks.")


def _padded(layer: Layer, factor: Any, slot: str, rank: int) -> Tensor:
    """A factor's weight, padded with zeros to a rank."""
    groups, dim, W = getattr(layer.base.leaf, "groups", 1), int(slot == "lora_B"), factor.weight.data
    if rank % groups or (rank // groups if dim else rank) < W.shape[dim]:
        now = W.shape[dim] * (groups if dim else 1)
        raise ConfigError(
            f"target_rank {rank} must be a multiple of {groups} and at least {now}, the rank of an adapter."
        )
    return _pad(W, rank // groups, 1, 1) if dim else _pad(W, rank, 0, groups)


def _pad(W: Tensor, size: int, dim: int, groups: int) -> Tensor:
    """W with zeros behind it along `dim`; with groups, behind each group's part of it."""
    if dim == 1:
        padded = W.new_zeros(W.shape[0], size, *W.shape[2:])
        padded[:, : W.shape[1]] = W
        return padded
    parts = W.unflatten(0, (groups, -1))  # (groups, r / groups, ...)
    padded = W.new_zeros(groups, size // groups, *W.shape[1:])
    padded[:, : parts.shape[1]] = parts
    return padded.flatten(0, 1)
