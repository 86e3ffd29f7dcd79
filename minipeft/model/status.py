"""What state a model's adapters are in: which exist, run, are merged, train, and where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..core.layer import Layer
from ..core.quantised import backend_name
from ..core.tuner import tuner_of
from .wrappers import ModulesToSaveWrapper

Irregular = Literal["irregular"]  # the layers differ, which is hardly what anyone wants


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer: by adapter name where it is a dict."""

    name: str  # path in the model
    module_type: str  # for example "lora.Linear"
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The state of a model with adapters; "irregular" where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters; packed 4-bit weights count as the numbers they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One record for each adapted layer of a PeftModel, or of a model with injected adapters.

    Raises `TypeError` for prompt learning, which has no such layers, and `ValueError` when there is no adapted layer.
    """
    root = _root(model)
    found = []
    for name, module in root.named_modules():
        if isinstance(module, (Layer, ModulesToSaveWrapper)):
            found.append(_layer_status(name, module))
    if not found:
        raise ValueError("No adapter layers found in the model: it is neither a PeftModel nor were adapters injected.")
    return found


def _layer_status(name: str, module: Any) -> TunerLayerStatus:
    grads: dict[str, list[bool]] = defaultdict(list)
    devices: dict[str, set[str]] = defaultdict(set)
    for adapter in module._get_available_adapters():
        for slot in module.adapter_layer_names + module.other_param_names:
            box = module._modules.get(slot)
            if box is None or adapter not in box:
                continue
            tensors = [box[adapter]] if not isinstance(box[adapter], nn.Module) else list(box[adapter].parameters())
            devices[adapter] |= {t.device.type for t in tensors}
            if slot not in module.adapter_layer_names:
                continue
            if not isinstance(module, Layer) or slot.startswith(module.adapters[adapter].prefix):
                grads[adapter] += [t.requires_grad for t in tensors]
    return TunerLayerStatus(
        name=name,
        module_type=module._get_name(),
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(module.merged_adapters),
        requires_grad={adapter: _all_or_none(values) for adapter, values in grads.items()},
        available_adapters=sorted(module._get_available_adapters()),
        devices={adapter: sorted(values) for adapter, values in devices.items()},
        quantization_backend=backend_name(module.get_base_layer()) if isinstance(module, Layer) else None,
    )


def get_model_status(model: Any) -> TunerModelStatus:
    """One record for a whole PeftModel, or a model with injected adapters. Raises as `get_layer_status` does."""
    root, rows = _root(model), get_layer_status(model)
    is_peft = root is not model
    grads: dict[str, list[Any]] = defaultdict(list)
    devices: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for adapter, value in row.requires_grad.items():
            grads[adapter].append(value)
        for adapter, kinds in row.devices.items():
            devices[adapter] |= set(kinds)
    merged = {name for row in rows for name in row.merged_adapters}
    partly = any((set(row.available_adapters) - set(row.merged_adapters)) & merged for row in rows)
    trainable, total = count_parameters(model)
    if is_peft:
        base_type = type(model.get_base_model()).__name__
        peft_types = {n: c.peft_type.value for n, c in root.peft_config.items()}
    else:
        base_type, peft_types = (type(model).__name__ if hasattr(model, "config") else "other"), {}
    return TunerModelStatus(
        base_model_type=base_type,
        adapter_model_type=type(root).__name__ if is_peft else "None",
        peft_types=peft_types,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(rows),
        enabled=_same(row.enabled for row in rows),
        active_adapters=_same(row.active_adapters for row in rows),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={name: _all_or_none(values) for name, values in grads.items()},
        available_adapters=sorted({name for row in rows for name in row.available_adapters}),
        devices={name: sorted(values) for name, values in devices.items()},
        quantization_backend=_same(row.quantization_backend for row in rows),
    )


def _root(model: Any) -> Any:
    if not hasattr(model, "active_peft_config"):  # no PeftModel
        return model
    if model.base_model is not tuner_of(model) or model.active_peft_config.is_adaption_prompt:
        raise TypeError("Prompt learning and adaption prompts have no adapter layers, so there is no layer status.")
    return model.base_model


def _same(values: Iterable[Any]) -> Any:
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else "irregular"


def _all_or_none(values: list[Any]) -> bool | Irregular:
    if all(value is True for value in values):
        return True
    return False if all(value is False for value in values) else "irregular"
