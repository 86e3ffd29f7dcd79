"""What a PeftModel does whose adapters are on layers: its `base_model` is a tuner around the model.

prompt.py has the same functions for prompts, where `base_model` is the model itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ..core.adapter import Delta
from ..core.bases import Linear
from ..core.errors import PeftWarning
from ..core.layer import layers
from .tuner import tuner_class


def setup(peft_model: Any, model: nn.Module, name: str, config: Any, **options: Any) -> None:
    """Put the first adapter into `model`; `options` as for `add`."""
    tuner = tuner_class(config.peft_type).wrap(model)
    tuner.add(name, config, **options)
    peft_model.base_model, peft_model.active_adapter = tuner, name


def add(peft_model: Any, name: str, config: Any, **options: Any) -> Any:
    """Add a further adapter; see `Tuner.add`."""
    return peft_model.base_model.add(name, config, **options)


def configs(peft_model: Any) -> dict[str, Any]:
    """Configurations by adapter name."""
    return peft_model.base_model.peft_config


def set_configs(peft_model: Any, value: dict[str, Any]) -> None:
    """Have other configurations."""
    peft_model.base_model.peft_config = value


def active(peft_model: Any) -> list[str]:
    """Names of the active adapters."""
    return peft_model.base_model.active_adapters


def base_of(peft_model: Any) -> Any:
    """The base model, with the adapters in it."""
    return peft_model.base_model.model


def activate(peft_model: Any, name: str, inference_mode: bool) -> None:
    """Make one adapter active."""
    peft_model.base_model.set_adapter(name, inference_mode)


def set_requires_grad(peft_model: Any, names: str | Sequence[str], requires_grad: bool) -> None:
    """Make adapters trainable, or freeze them."""
    peft_model.base_model.set_requires_grad(names, requires_grad)


def delete(peft_model: Any, name: str) -> None:
    """Remove an adapter."""
    tuner = peft_model.base_model
    tuner.delete_adapter(name)
    if len(tuner.active_adapters) == 1:
        peft_model.active_adapter = tuner.active_adapters[0]
    elif name == peft_model.active_adapter:
        peft_model.active_adapter = tuner.active_adapters


@contextmanager
def disabled(peft_model: Any) -> Iterator[None]:
    """Within the context no adapter is on."""
    if peft_model.base_model.enabled == "irregular":
        warnings.warn("Some adapter layers are enabled and others not; after the context all will be.", PeftWarning)
    with peft_model.base_model.without_adapters():
        yield


def telling(peft_model: Any, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
    """While it is open, the layers know what a call says of each sample."""
    return peft_model.base_model._tell(args, kwargs)


def takes_task_ids(peft_model: Any) -> bool:
    """Whether `forward` needs `task_ids`."""
    return "task_ids" in peft_model.base_model.own_inputs


def forward(peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's forward with the active adapters."""
    return peft_model._run_tuner(*args, **kwargs)


def generate(peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's `generate` with the active adapters."""
    return peft_model.base_model.generate(*args, **kwargs)


def supports_lora_conversion(peft_model: nn.Module) -> bool:
    """Whether every adapted layer is linear, its change of W is additive, and W still there."""
    found = [adapter for layer in layers(peft_model) for adapter in layer.adapters.values()]
    linear = all(isinstance(adapter.base, Linear) and not adapter.base.needs_weights for adapter in found)
    return bool(found) and linear and all(isinstance(adapter, Delta) and not adapter.rewrites for adapter in found)
