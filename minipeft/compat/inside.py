"""What users and libraries import from inside peft: which modules a configuration means, models without values, ..."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.errors import ConfigError
from ..core.kinds import base_of
from ..core.layer import Layer
from ..core.plan import NO_CONFIG
from ..core.targets import ALL_LINEAR, DUMMY_TARGETS, EMBEDDINGS, HEADS, Targets, all_linear, named, suffixes
from ..core.tuner import tuner_of
from ..core.walk import walk
from ..model.tying import tied_names

INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
DUMMY_TARGET_MODULES = DUMMY_TARGETS
DUMMY_MODEL_CONFIG = NO_CONFIG
EMBEDDING_LAYER_NAMES = list(EMBEDDINGS)
SEQ_CLS_HEAD_NAMES = list(HEADS)
Layer.unused |= {  # PEFT: slots of other kinds of layer, or of other settings
    "ADALORA": ("lora_embedding_A", "lora_embedding_B"),
    "GRALORA": ("gralora_A_general", "gralora_B_general"),
    "HIRA": ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    "LOHA": ("hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "LORA": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    "OFT": ("oft_R", "oft_embedding_R"),
}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20  # PEFT: longer lists of targets are shortened when an adapter is loaded


# --------------------------------------------------------------------------------------------------------- targets
def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a configuration means the module at the path `key`."""
    return key in Targets(config)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The paths of a model's modules, those that the adapter's configuration means ("matched") and the "unmatched"."""
    tuner = tuner_of(tuner)
    targets = Targets(tuner.peft_config[adapter_name])
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path in dict.fromkeys(path for path, _, _ in walk(tuner.model)):
        found["matched" if path in targets else "unmatched"].append(path)
    return found


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """The configuration, with the modules of `model` that "all-linear" means in its place."""
    names = getattr(peft_config, "target_modules", None)
    if isinstance(names, str) and names.lower() == ALL_LINEAR:
        bases = [(path, base_of(module)) for path, _, module in walk(model) if path]
        peft_config.target_modules = all_linear(model, peft_config.task_type, bases)
    return peft_config


def _find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """Short names that mean all of `target_modules` and none of `other_module_names`."""
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError(f"target_modules should be a list or set of strings, got {target_modules!r}.")
    wanted, others = set(target_modules), set(other_module_names)
    if "" in wanted:
        raise ConfigError("target_modules should not contain an empty string: that is the model itself.")
    if common := sorted(wanted & others):
        raise ConfigError(f"target_modules and other_module_names contain common elements: {common[:5]}.")
    taken = {tail for path in others for tail in suffixes(path)}
    found: set[str] = set()
    for path in sorted(wanted, key=lambda path: path.split(".")[::-1]):
        if not named(path, found):
            found.add(next((tail for tail in reversed(suffixes(path)) if tail not in taken), path))
    return found


def _get_module_names_tied_with_embedding(model: Any) -> list[str]:
    """The paths, in the base model, of the modules whose weight is that of the input embedding."""
    return tied_names(getattr(tuner_of(model), "model", model))


def _get_no_split_modules(model: Any) -> set[str]:
    """The classes of modules that are to stay on one device, by name."""
    return set(getattr(model, "_no_split_modules", None) or ())


# ----------------------------------------------------------------------------------------------------- empty weights
_empty = [True]  # the last one says whether `init_empty_weights` has an effect now


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Parameters of modules that are made within the context have no values: they are on the meta device.

    `include_buffers`: buffers as well.
    """
    parameter, buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        parameter(module, name, param)
        if param is not None and _empty[-1]:
            options = {**vars(param), "requires_grad": param.requires_grad}
            module._parameters[name] = type(param)(param.to("meta"), **options)

    def register_buffer(module: nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
        buffer(module, name, tensor if tensor is None or not _empty[-1] else tensor.to("meta"), persistent)

    cls: Any = nn.Module
    cls.register_parameter = register_parameter
    if include_buffers:
        cls.register_buffer = register_buffer
    try:
        yield
    finally:
        cls.register_parameter, cls.register_buffer = parameter, buffer


def skip_init_on_device(func: Callable) -> Callable:
    """`func`, with no effect of `init_empty_weights` on what it makes."""

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        _empty.append(False)
        try:
            return func(*args, **kwargs)
        finally:
            _empty.pop()

    return call


# -------------------------------------------------------------------------------------------------------- AdaMSS
class AdamssAsaCallback:
    """For transformers' Trainer: calls `update_and_allocate` in every step, as AdaMSS with `use_asa` needs."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the optimizer's step, with the gradients still there."""
        tuner: Any = None if model is None else tuner_of(model)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return lambda *args, **kwargs: None  # Trainer calls each of its events on each callback
