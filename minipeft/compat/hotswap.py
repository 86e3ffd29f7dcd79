"""Putting another LoRA checkpoint into an adapter that is there, in place, so that compiled code stays valid."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import variants
from ..core.bases import Conv, Conv1D, Linear, inference_mode_off
from ..core.config import PeftConfig, PeftType
from ..core.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    MergeError,
    PeftWarning,
    UnsupportedFeatureError,
)
from ..core.files import of_one_version
from ..core.layer import Layer
from ..core.state import Entry, incoming, infer_device, load_peft_weights, onloaded, strip
from ..core.tuner import tuner_of
from ..methods.lora.lora import Factors
from ..methods.lora.padding import RANK_OF, groups_of, layer_of, pad, slot_of
from ..model.checkpoint import base_entries, entries_of_model
from ..model.plan import ModelPlan
from ..model.tuner import tuner_class

MUST_AGREE = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora", "layer_replication")


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
    the two do not fit; see `check_hotswap_configs_compatible` and `hotswap_adapter_from_state_dict`. Whole embedding
    layers that the checkpoint holds as the model's own must be what the model has.
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
    entries = _entries(model, adapter_name)
    base, again = base_entries(getattr(model, "_orig_mod", model), weights, entries)
    given = {strip(key): tensor for key, tensor in weights.items()}
    with onloaded(getattr(model, "_orig_mod", model), base):
        for entry in base:
            key = strip(entry.saved)
            value = given.pop(key)
            if value.shape != entry.tensor.shape or not torch.equal(value.to(entry.tensor), entry.tensor):
                raise CheckpointError(
                    f"'{key}' is the model's own and has other values there; hot swapping keeps those."
                )
    live = {strip(entry.saved): entry.live for entry in entries}
    state_dict = {live.get(key, key): tensor for key, tensor in given.items() if key not in again}
    hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config)


@inference_mode_off()
@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Put the tensors of `state_dict`, by live key, in the place of those of adapter `adapter_name`.

    `config` becomes the adapter's configuration. A layer that it does not adapt is set to 0 and is not saved. A smaller
    rank is padded with zeros, which are not saved either; a larger one takes new memory. Raises `PeftError`, with
    nothing changed, for keys that the model does not have, for all that loading such a checkpoint would refuse, for
    shapes that differ in more than the rank, and when the adapter is merged.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    entries = {entry.live: entry for entry in _entries(model, adapter_name) if parameter_prefix in entry.live}
    if any(adapter_name in layer.merged_adapters for layer in model.modules() if isinstance(layer, Layer)):
        raise MergeError(f"Cannot hot-swap adapter '{adapter_name}' while it is merged; unmerge it first.")
    given = {key.removeprefix("_orig_mod."): tensor for key, tensor in state_dict.items()}
    if unexpected := [key for key in given if key not in entries]:
        raise CheckpointError(f"Hot swapping needs the same layers; unexpected keys found: {', '.join(unexpected)}.")
    config = copy.deepcopy(config)
    config.inference_mode = inner.peft_config[adapter_name].inference_mode
    planned = _planned(inner, adapter_name, config, {entries[key].saved: value for key, value in given.items()})
    sources = {strip(entry.saved): entry for entry in planned}
    swaps: list[tuple[Entry, Entry | None, Tensor | None]] = []  # what is there, what is to be there, and in which size
    for entry in entries.values():
        source = sources.get(strip(entry.saved))
        adapter = layer_of(entry).adapters[adapter_name]
        if source is None and not adapter.fades:
            raise UnsupportedFeatureError(
                f"The new adapter leaves '{adapter.path}' alone, where the one in its place cannot be set to 0. "
                "Delete that one and load the new one."
            )
        swaps.append((entry, source, None if source is None else _resized(entry, source.tensor, adapter_name)))
    # from here on nothing can fail
    inner.peft_config[adapter_name] = config
    with onloaded(inner, entries.values(), keep=True):
        for entry, source, value in swaps:
            adapter, old = layer_of(entry).adapters[adapter_name], entry.tensor
            adapter.config, adapter.idle = config, source is None
            if source is None or value is None:
                old.zero_()
                continue
            if value.shape == old.shape:
                old.copy_(value)
            else:
                old.data = value.to(old, copy=True)
            if isinstance(adapter, Factors):
                _note_padded(adapter, entry.live, source.tensor.shape, value.shape)
            _take_over(layer_of(entry), layer_of(source), adapter_name)


def _planned(model: Any, name: str, config: Any, weights: dict[str, Tensor]) -> list[Entry]:
    """The tensors of the new adapter, as loading builds and checks it beside the model, into which it is not put."""
    tuner = tuner_class(config.peft_type).wrap(getattr(tuner_of(model), "model", model))
    replicated, config.layer_replication = config.layer_replication, None  # the model has those layers already
    told = config.target_modules or config.target_parameters
    plan = ModelPlan(tuner, name, config, loading=True, empty=True, keys=None if told else weights)
    try:
        plan.load(incoming(weights))
    finally:
        plan.abort()
    config.layer_replication = replicated
    return list(plan.entries())


def _take_over(layer: Any, scratch: Any, name: str) -> None:
    """Give a layer the plain values of an adapter; a scaling that is a tensor stays the same one."""
    for slot in scratch.other_param_names:
        value = (scratch.contents(slot) or {}).get(name)
        held = (layer.contents(slot) or {}).get(name)
        if isinstance(held, Tensor) and slot == "scaling":
            held.fill_(value)  # type: ignore[arg-type]
        elif value is not None and not isinstance(value, (Tensor, nn.Module)):
            layer.put_values(name, {slot: value})


@inference_mode_off()
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
    padded: list[tuple[Any, Any, str, Tensor]] = []
    for layer in found if target_rank is not None else ():
        if type(layer.base) in (Linear, Conv1D, Conv):  # PEFT: no other kind
            for adapter in layer.adapters.values():
                _check_pads(adapter)
                for slot in ("lora_A", "lora_B"):
                    factor = getattr(adapter, slot)
                    padded.append((adapter, factor, slot, _padded(layer, factor, slot, target_rank or 0)))
    for layer in found:
        for name, value in layer.scaling.items():
            layer.scaling[name] = torch.as_tensor(value, dtype=torch.float32, device=layer.base.device)
    for adapter, factor, slot, weight in padded:
        _note_padded(adapter, f".{slot}.", adapter.padded.get(slot, factor.weight.shape), weight.shape)
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
    return [entry for entry in entries_of_model(inner, name, idle=True) if entry.layer is not None]


def _resized(entry: Entry, value: Tensor, name: str) -> Tensor:
    """`value` with the rank of the tensor that it replaces, if that is larger; otherwise as it is."""
    old, layer = entry.tensor, entry.layer
    assert layer is not None
    if value.shape == old.shape:
        return value
    where = [dim for dim in range(value.dim()) if value.dim() == old.dim() and value.shape[dim] != old.shape[dim]]
    rank = RANK_OF.get(slot_of(entry.live), 1)
    if where != [rank]:
        key = entry.live
        raise CheckpointError(
            f"size mismatch for {key}: {tuple(value.shape)} in the checkpoint, {tuple(old.shape)} in its place."
        )
    if value.shape[rank] > old.shape[rank]:
        return value
    _check_pads(layer.adapters[name])
    return pad(value, old.shape[rank], rank, groups_of(layer) if rank == 0 else 1)


def _note_padded(adapter: Factors, key: str, shape: Any, now: Any) -> None:
    """Note on an adapter which shape a factor has without the zeros behind it."""
    padded = {slot: of for slot, of in adapter.padded.items() if slot != slot_of(key)}
    adapter.padded = padded if shape == now else {**padded, slot_of(key): shape}


def _check_pads(adapter: Any) -> None:
    if not adapter.can_pad:
        raise UnsupportedFeatureError(f"The rank of {adapter} cannot be raised: zeros would not stand in its blocks.")


def _padded(layer: Layer, factor: Any, slot: str, rank: int) -> Tensor:
    """A factor's weight, padded with zeros to a rank."""
    groups, dim, W = getattr(layer.base.leaf, "groups", 1), int(slot == "lora_B"), factor.weight.data
    if rank % groups or (rank // groups if dim else rank) < W.shape[dim]:
        now = W.shape[dim] * (groups if dim else 1)
        raise ConfigError(
            f"target_rank {rank} must be a multiple of {groups} and at least {now}, the rank of an adapter."
        )
    return pad(W, rank // groups, 1, 1) if dim else pad(W, rank, 0, groups)
