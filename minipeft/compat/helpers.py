"""PEFT's helpers around a model with adapters."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from ..core.config import PeftConfig, PeftType
from ..core.errors import UnsupportedFeatureError
from ..core.layer import Layer
from ..methods.lora.dora import Magnitude

SCALED = (PeftType.LORA, PeftType.ADALORA)


def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """Whether a folder, or an id on the hub, holds an adapter whose configuration can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever the hub raises
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the context the scaling of every LoRA layer is `multiplier` times what it was; see arXiv:2109.01903.

    Raises `TypeError` for a multiplier that is no number and `UnsupportedFeatureError` for a model without LoRA.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier).__name__}.")
    before = [(m, m.scaling) for m in model.modules() if isinstance(m, Layer) and m.method in SCALED]
    if not before:
        raise UnsupportedFeatureError("scaling is only supported for models with LoRA layers; this one has none.")
    for layer, scaling in before:
        vars(layer)["scaling"] = {name: value * multiplier for name, value in scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in before:
            vars(layer)["scaling"] = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the context (if `active`) layers do not cast their input to the adapter's dtype: others see to that."""
    found = [vars(m) for m in model.modules() if isinstance(m, Layer)] if active else []
    before = [layer["cast_input_dtype_enabled"] for layer in found]
    for layer in found:
        layer["cast_input_dtype_enabled"] = False
    try:
        yield
    finally:
        for layer, value in zip(found, before):
            layer["cast_input_dtype_enabled"] = value


class DoraCaching:
    """Keeps the norms of DoRA from one pass to the next, outside of training: faster, for more memory.

    As a context, `with DoraCaching(): ...`, or for good, `DoraCaching()(enabled=True)`. Call `model.eval()` after
    weights were edited by way of `.data`.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before, Magnitude.caching = Magnitude.caching, self.enabled

    def __exit__(self, *error: Any) -> None:
        Magnitude.caching = self.before

    def __call__(self, enabled: bool = True) -> None:
        Magnitude.caching = enabled


class MontecloraTrainerMixin:
    """Puts MonteCLoRA's loss into a trainer of transformers: `class T(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The task's loss and that of MonteCLoRA; with `return_outputs` (loss, outputs)."""
        from ..methods.lora.model import LoraModel

        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        losses = [module._get_monteclora_loss() for module in model.modules() if isinstance(module, LoraModel)]
        extra = sum(losses) / max(len(losses), 1)
        return (result[0] + extra, result[1]) if return_outputs else result + extra


def update_forward_signature(model: Any) -> None:
    """Give `model.forward` the signature and docstring of the base model's, if its own is (*args, **kwargs)."""
    _adopt(model, "forward", [["args", "kwargs"]])


def update_generate_signature(model: Any) -> None:
    """The same for `model.generate`, if there is one."""
    if hasattr(model, "generate"):
        _adopt(model, "generate", [["args", "kwargs"], ["kwargs"]])


def update_signature(model: Any, method: str = "all") -> None:
    """Both, or with `method` "forward" or "generate" one of them. Raises `ValueError` for any other."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method!r} is not supported; choose one of 'forward', 'generate', 'all'.")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _adopt(model: Any, name: str, vague: list[list[str]]) -> None:
    own, theirs = getattr(model, name), getattr(type(model.get_base_model()), name)
    if list(inspect.signature(own).parameters) not in vague:
        return

    @wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    call.__signature__ = inspect.signature(getattr(model.get_base_model(), name))  # type: ignore[attr-defined]
    setattr(model, name, call)
