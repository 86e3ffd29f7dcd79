"""The core as a library: adapters on the layers of a plain module, under PEFT's names and in PEFT's files.

    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    ...                                                   train it: its adapter's parameters require gradients
    save_adapter(model, "folder")                         adapter_config.json, adapter_model.safetensors
    load_adapter(model, "other-folder", "other")          a second one, beside it
    set_adapter(model, ["default", "other"])              both act
    with mixed_batch(model, ["default", "__base__"]):     one name for each sample
        y = model(x)
    model = merge_and_unload(model)                       no adapter left, W' = W + dW in its place

The model is changed in place and stays what it was to all other code; what it has of adapters stands on its layers.
Whatever concerns more than layers (prompts, `modules_to_save`, trained biases, tied embeddings) is PeftModel's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .adapter import adapter_class
from .bases import inference_mode_off
from .config import PeftConfig, check_config
from .errors import AdapterNameError, NotIncludedError
from .files import of_one_version, write_checkpoint
from .state import (
    PREFIX,
    Entry,
    LoadReport,
    entries_of_layers,
    incoming,
    load_into,
    onloaded,
    read_weights,
    serialise,
)
from .tuner import Tuner


def inject_adapter_in_model(peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Put a new adapter on the layers that `peft_config` targets; it becomes the active one. Returns `model`.

    Everything else of the model is frozen by the first one. Raises `PeftError`, with the model left as it was, when
    anything does not fit.
    """
    tuner = _tuner_for(peft_config, model)
    tuner.add(adapter_name, peft_config)
    tuner.set_adapter(adapter_name, peft_config.inference_mode)
    return model


def _tuner_for(config: PeftConfig, model: nn.Module) -> Tuner:
    check_config(config)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise NotIncludedError(f"{config.method.value} adapts a model as a whole, not layers: use PeftModel.")
    return Tuner.of(model)


def _tuner_of(model: nn.Module, *names: str) -> Tuner:
    """The tuner of a model with adapters. Raises `AdapterNameError` for a name of none."""
    tuner = Tuner.of(model)
    if unknown := [name for name in names if name not in tuner.peft_config]:
        raise AdapterNameError(f"Adapter {unknown[0]} not found; this model has {sorted(tuner.peft_config)}.")
    return tuner


# ----------------------------------------------------------------------------------------------------- which adapters
def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make one or several adapters active, and trainable unless `inference_mode`; freeze the others."""
    _tuner_of(model).set_adapter(adapter_name, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters trainable, or freeze them, without activating them."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    _tuner_of(model, *names).set_requires_grad(names, requires_grad)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes what it did before it had adapters."""
    with _tuner_of(model).without_adapters():
        yield


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter. When it was the active one, the first that is left takes its place."""
    _tuner_of(model).delete_adapter(adapter_name)


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str] | None = None, **inputs: Any) -> Iterator[None]:
    """Within the context each sample of a batch has its own adapter; "__base__" is none.

    `inputs`: what methods that route by it need to know of the batch, such as `task_ids` (batch,) or `input_ids`
    (batch, tokens).
    """
    tuner = _tuner_of(model)
    tuner.training = model.training
    given = {**inputs, "adapter_names": adapter_names}
    with tuner._tell((), given):
        yield


# ------------------------------------------------------------------------------------------------------------ merging
def merge(model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Write adapters (default: the active ones) into the frozen weights, until `unmerge`.

    Raises `MergeError`, with nothing merged, when no weights do the same; with `safe_merge` also for numbers that are
    not finite.
    """
    _tuner_of(model).merge_adapter(adapter_names, safe_merge)


def unmerge(model: nn.Module) -> None:
    """Take all merged adapters out of the frozen weights; not one bit of them differs from before."""
    _tuner_of(model).unmerge_adapter()


def merge_and_unload(
    model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False
) -> nn.Module:
    """The model with adapters (default: the active ones) in its weights for good, and no adapter left on it."""
    return _tuner_of(model).merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)


def unload(model: nn.Module) -> nn.Module:
    """The model without any adapter, its weights as they were before adapters were merged into them."""
    return _tuner_of(model).unload()


# ------------------------------------------------------------------------------------------------------ checkpoints
def _entries(tuner: Tuner, name: str, prefix: str = "") -> list[Entry]:
    return list(entries_of_layers(tuner.model, name, tuner.peft_config[name], tuner.shared_slots(), prefix, ""))


def _saved(tuner: Tuner, name: str, prefix: str = "") -> dict[str, Tensor]:
    config, entries = tuner.peft_config[name], _entries(tuner, name, prefix)
    with onloaded(tuner.model, entries):
        tensors = {entry.saved: entry.tensor.detach() for entry in entries}
        return adapter_class(config).convert_for_save(config, name, tensors, entries)


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter, by saved key without the prefix of a PeftModel: `encoder.fc.lora_A.weight`."""
    return _saved(_tuner_of(model, adapter_name), adapter_name)


@inference_mode_off()
def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", strict: bool = True
) -> LoadReport:
    """Write tensors into an adapter that is there. Returns the missing and the unexpected keys.

    Keys may have the prefix of a PeftModel. Raises `CheckpointError`, with nothing written, when anything does not fit;
    `strict=False` only warns of missing and unexpected ones.
    """
    entries, weights = _entries(_tuner_of(model, adapter_name), adapter_name), incoming(peft_model_state_dict)
    return load_into(model, adapter_name, entries, weights, strict)


def save_adapter(model: nn.Module, save_directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write PEFT's two files, which `load_adapter` and PEFT's `PeftModel.from_pretrained` read, in one step."""
    tuner = _tuner_of(model, adapter_name)
    tensors, config = _saved(tuner, adapter_name, PREFIX), copy.deepcopy(tuner.peft_config[adapter_name])
    config.inference_mode = True
    kind = type(model)
    mapping = None if config.task_type else {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    write_checkpoint(save_directory, config.to_json(mapping), serialise(tensors))


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
) -> nn.Module:
    """Put a saved adapter on the layers; it becomes the active one, frozen unless `is_trainable`. Returns `model`.

    `folder` may be a hub id when huggingface_hub is installed. Raises `PeftError`, with the model left as it was, when
    anything does not fit.
    """
    config, weights = of_one_version(
        folder, None, lambda: (PeftConfig.from_pretrained(folder), read_weights(folder))
    )
    config.inference_mode = not is_trainable
    tuner = _tuner_for(config, model)
    tuner.add(adapter_name, config, weights=weights)
    tuner.set_adapter(adapter_name, inference_mode=not is_trainable)
    return model
