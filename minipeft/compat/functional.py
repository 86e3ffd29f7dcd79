"""PEFT's functions for a model whose adapters were injected, without a PeftModel around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.errors import MergeError
from ..core.layer import Layer
from ..model.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from ..model.factory import inject_adapter_in_model
from ..model.wrappers import ModulesToSaveWrapper

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: type = Layer
) -> None:
    """Make adapters active, and trainable unless `inference_mode`, on every layer that is a `layer_cls`."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) or (isinstance(module, Layer) and isinstance(module, layer_cls)):
            module.set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str, layer_cls: type = Layer) -> list[str] | None:
    """Remove an adapter from every layer that is a `layer_cls`, and its copies of `modules_to_save`.

    Its configuration stays in `model.peft_config`. `prefix`, that of the method ("lora_"), is PEFT's and not needed.
    Returns the adapters that are active then, or None when there are no layers. Raises `MergeError`, with nothing
    removed, when the adapter is merged.
    """
    found = [m for m in model.modules() if isinstance(m, Layer) and isinstance(m, layer_cls)]
    if any(adapter_name in layer.merged_adapters for layer in found):
        raise MergeError(
            f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
        )
    was = list(found[0].active_adapters) if found else []
    active = [name for name in was if name != adapter_name]
    if not active and was:  # the same one everywhere, also where it has no part
        active = sorted({name for layer in found for name in layer.adapters} - {adapter_name})[:1]
    places: list[Any] = [*found, *(m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))]
    for module in places:
        module.delete_adapter(adapter_name)
        if active != was:
            module.set_adapter(active)
    return active if found else None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters trainable, or freeze them, without activating them."""
    for module in model.modules():
        if isinstance(module, (Layer, ModulesToSaveWrapper)):
            module.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn an adapter's float16, bfloat16 and float8 tensors into float32, unless `autocast_adapter_dtype` is False."""
    for module in model.modules() if autocast_adapter_dtype else ():
        if isinstance(module, Layer):
            module.upcast(adapter_name)
