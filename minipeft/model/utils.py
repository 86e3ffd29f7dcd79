"""Small tools under PEFT's names: preparing a model for training, and reading and writing its base weights."""

from __future__ import annotations

import gc
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.bases import inference_mode_off
from ..core.errors import PeftWarning, UnsupportedFeatureError
from ..core.state import LoadReport
from ..core.targets import embedding
from ..core.walk import Wrapper

LOW_PRECISION = (torch.float16, torch.bfloat16)


@inference_mode_off()
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters become `dtype` (float16 or bfloat16), trained ones float32."""
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.float32 if parameter.requires_grad else dtype)


def require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    """A forward hook: gradients begin at the output."""
    output.requires_grad_(True)


def require_input_grads(model: Any) -> None:
    """Let gradients begin at the output of the word embedding, where a model has one."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif (words := embedding(model)) is not None:
        words.register_forward_hook(require_grad)


@inference_mode_off()
def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a quantised model, turn its half-precision parameters into float32, and switch checkpointing on.

    The parameters of GPTQ, AQLM, EETQ, HQQ and torchao stay as they are. Gradient checkpointing is only switched on for
    a quantised model; `auto_clear_cache` gives the memory of the old parameters back to the accelerator.
    """
    method = getattr(model, "quantization_method", None)
    packed = method in ("gptq", "aqlm", "eetq", "torchao", "hqq") or getattr(model, "hqq_quantized", False)
    for parameter in model.parameters():
        parameter.requires_grad = False
    if not packed:
        for parameter in model.parameters():
            if parameter.dtype in LOW_PRECISION and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
    bits = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    if not (use_gradient_checkpointing and (bits or packed)):
        return model
    options = gradient_checkpointing_kwargs or {}
    if options.get("use_reentrant", True):
        require_input_grads(model)
    takes_options = "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters
    if takes_options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        if options:
            warnings.warn("gradient_checkpointing_kwargs is ignored: the model does not take it.", PeftWarning)
        model.gradient_checkpointing_enable()
    return model


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """The layout that Bloom had before transformers 4.43: keys (batch * heads, head dim, tokens), values transposed.

    `past_key_values` are tensors (2, batch, heads, tokens, head dim), which together are split into keys, then values.
    """
    keys, values = torch.cat(past_key_values).flatten(1, 2).chunk(2)  # each (layers, batch * heads, tokens, head dim)
    return tuple(zip(keys.transpose(2, 3), values))


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module called `key`, that module, and its name there."""
    head, _, last = key.rpartition(".")
    return model.get_submodule(head), model.get_submodule(key), last


def fsdp_auto_wrap_policy(model: Any) -> Callable[..., bool]:
    """For FullyShardedDataParallel: wrap each block of the model, each prompt, each trained module without children.

    FSDP shards what it wraps as one tensor, so that trained and frozen parameters must not be wrapped together. Blocks
    are the classes in `model._no_split_modules`, or by name in the environment's FSDP_TRANSFORMER_CLS_TO_WRAP.
    Raises `UnsupportedFeatureError` when the model has no module of such a name.
    """
    from .prompt import Prompt

    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP") or ",".join(getattr(model, "_no_split_modules", None) or ())
    kinds = {type(module).__name__: type(module) for module in model.modules()}
    if missing := [name for name in names.split(",") if name and name not in kinds]:
        raise UnsupportedFeatureError(f"Could not find the layer classes to wrap in the model: {', '.join(missing)}.")
    whole: tuple[type, ...] = (Prompt, *(kinds[name] for name in names.split(",") if name))

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        """Whether to go into the module's children (`recurse`), or to wrap it."""
        weight = getattr(module, "weight", None)
        trained = weight is not None and weight.requires_grad and not any(True for _ in module.children())
        return recurse or trained or isinstance(module, whole)

    return policy


# ------------------------------------------------------------------------------------------------------ base weights
def _base_keys(model: Any) -> dict[str, str]:
    """Live key by original key, of everything in the state dict that adapters did not bring."""
    base = model.get_base_model()
    return {key: live for live in base.state_dict() if (key := _original(base, live)) is not None}


def _original(module: Any, live: str) -> str | None:
    """What a tensor was called before adapters came; None for a tensor of an adapter."""
    path = []
    for part in live.split("."):
        if not isinstance(module, Wrapper):
            path.append(part)
        elif part != module.wraps:
            return None
        module = module._modules.get(part)
    return ".".join(path)


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base model's state dict under the names that it had before adapters came, without them."""
    state = model.get_base_model().state_dict()
    return {key: state[live] for key, live in _base_keys(model).items()}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadReport:
    """Load weights under the base model's original names. Returns the missing and the unexpected keys.

    Raises `RuntimeError`, with nothing loaded, when there are any and `strict`.
    """
    keys = _base_keys(model)
    missing, unexpected = [k for k in keys if k not in state_dict], [k for k in state_dict if k not in keys]
    if strict and (missing or unexpected):
        found = f"Missing key(s): {missing}. Unexpected key(s): {unexpected}"  # torch begins so
        raise RuntimeError(f"The state dict does not fit the base model. {found}.")
    given = {live: state_dict[key] for key, live in keys.items() if key in state_dict}
    model.get_base_model().load_state_dict(given, strict=False)
    return LoadReport(missing, unexpected)
