"""The ways to begin: a PeftModel around a model, or adapters injected into it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, overload

from torch import Tensor, nn

from ..core.config import PeftConfig, check_config
from ..core.errors import PeftWarning, UnsupportedFeatureError
from ..core.layer import Layer
from .mixed import PeftMixedModel
from .peft_model import PeftModel
from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .tuner import tuner_class


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: Literal[False] = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel: ...
@overload
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    *,
    mixed: Literal[True],
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftMixedModel: ...
@overload
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    *,
    mixed: bool,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel: ...
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel:
    """`model` with a new adapter, changed in place; the class follows from `peft_config.task_type`.

    `mixed`: a PeftMixedModel, which takes adapters of several methods. `autocast_adapter_dtype`: float16 and bfloat16
    adapter weights become float32. `low_cpu_mem_usage`: create the adapter on the meta device, to be loaded.

    Raises `PeftError` when anything does not fit; `model` is then as it was.
    """
    check_config(peft_config)
    before, now = peft_config.base_model_name_or_path, vars(model).get("name_or_path") or None
    peft_config.base_model_name_or_path = now
    if before is not None and before != now:
        warnings.warn(f"The configuration names the base model {before!r}, but this one is {now!r}.", PeftWarning)
    if any(isinstance(module, Layer) for module in model.modules()):
        warnings.warn(
            "This model has adapters already. To begin anew with another configuration, call `.unload()` first.",
            PeftWarning,
        )
    if revision is not None:
        if peft_config.revision not in (None, revision):
            old = peft_config.revision
            warnings.warn(f"revision {old!r} of the configuration is replaced by {revision!r}.", PeftWarning)
        peft_config.revision = revision
    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type or "", PeftModel)
    return cls(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into `model` itself, which is returned; its keys get no prefix. It becomes the active one.

    `state_dict`: adapt the layers that its keys speak of, whatever `target_modules` says; its values are not used.
    Not for prompt learning, nor for methods that keep tensors beside the model for all layers.
    """
    check_config(peft_config)
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise UnsupportedFeatureError("`inject_adapter_in_model` does not support prompt learning and adaption prompt.")
    kind = tuner_class(peft_config.peft_type)
    if kind.uses_shared_state:
        raise UnsupportedFeatureError(
            f"{peft_config.method.value} keeps shared state of all layers beside the model; use get_peft_model."
        )
    tuner = kind.of(model)
    existing = bool(tuner.peft_config)  # adapters that were injected before
    tuner.add(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage, keys=state_dict)
    if existing:
        tuner.set_adapter(adapter_name, peft_config.inference_mode)
    return model
