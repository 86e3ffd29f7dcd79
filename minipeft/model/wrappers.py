"""What stands in a model where a module is trained in full, or where rows of an embedding are beside other adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.batch import run_groups
from ..core.errors import BatchError, UnsupportedLayerError
from ..core.layer import Context, HoldsAdapters, Layer, adapted, named_input
from ..core.offload import HOOKS, real_copy
from ..core.targets import check_saved, saves
from ..core.walk import Wrapper, other_names, walk

SWITCHES = {  # what a wrapper around tokens has of the layer in it
    *("active_adapter", "active_adapters", "disable_adapters"),
    *("set_adapter", "enable_adapters", "set_requires_grad", "delete_adapter", "_get_available_adapters"),
}


class ModulesToSaveWrapper(HoldsAdapters, Wrapper):
    """A module trained in full: the frozen original, and a copy of it for each adapter (`modules_to_save`)."""

    wraps = "original_module"
    one_at_a_time = True
    adapter_layer_names = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()
    merged_adapters: list[str] = []

    def __init__(self, module: nn.Module, context: Context | None = None):
        super().__init__()
        self.check(module)
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.context = context or Context()
        self.trained, self.paused = set(), set()
        self._active_adapter = []
        self._disable_adapters = False

    @staticmethod
    def check(module: nn.Module) -> None:
        """Raise `UnsupportedLayerError` for modules that are never called, or adapted already."""
        if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList, Layer)):
            kind = type(module).__name__
            raise UnsupportedLayerError(f"modules_to_save cannot be applied to modules of type {kind}.")

    @property
    def adapters(self) -> Any:
        return self.modules_to_save

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save)

    @property
    def running(self) -> list[str]:
        if self._disable_adapters:
            return []
        return [n for n in self._active_adapter if n in self.modules_to_save]

    def forward(self, x: Any = None, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The active adapter's copy applied to the input; the original when there is none."""
        if self._disable_adapters or (adapter_names is None and self.context.now.adapter_names is None):
            return self.current(*(args if x is None else (x, *args)), **kwargs)
        if x is None:
            x = kwargs.pop(named_input(self.original_module, kwargs))
        if not isinstance(x, Tensor):
            raise BatchError(f"Mixed batches need modules whose first argument is a tensor, got a {type(x).__name__}.")
        groups = self.context.now.groups(len(x), adapter_names)
        assert groups is not None
        pick = lambda name: self.modules_to_save[name] if name in self.modules_to_save else self.original_module
        return run_groups(x, groups, lambda name, part: pick(name)(part, *args, **kwargs))

    @property
    def current(self) -> nn.Module:
        """The module that is in use."""
        running = self.running
        return self.modules_to_save[running[0]] if running else self.original_module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in HOOKS or "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.current, name)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use the copy of the one adapter of `adapter_names` that has one here."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        here = [n for n in names if n in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(f"Only one adapter can be set at a time for modules_to_save, got {here}.")
        super().set_adapter(here, inference_mode)

    def _train(self, name: str, on: bool) -> None:
        self.modules_to_save[name].requires_grad_(on)
        (self.trained.add if on else self.trained.discard)(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's copy."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
            self.trained.discard(adapter_name)
            self.paused.discard(adapter_name)
            self._active_adapter = [n for n in self._active_adapter if n != adapter_name]

    def unwrapped(self, names: list[str]) -> nn.Module:
        mine = [name for name in names if name in self.modules_to_save]
        return self.modules_to_save[mine[0]] if mine else self.original_module

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Saved key -> live key, below this module, of an adapter's tensors."""
        if adapter_name not in self.modules_to_save:
            return {}
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in self.modules_to_save[adapter_name].state_dict()}


def copied_modules(
    model: nn.Module, config: Any, loading: bool, targets: Iterable[str] = ()
) -> list[tuple[str, nn.Module, nn.Module]]:
    """(live path, module there now, its trained copy) of every module that a configuration's `modules_to_save` means.

    `targets`: live paths of layers that the same adapter is to be put on. `loading` as for `check_saved`.
    """
    names = getattr(config, "modules_to_save", None)
    names = {names} if isinstance(names, str) else set(names or ())
    found: list[tuple[str, nn.Module, nn.Module]] = []
    taken: list[str] = []
    paths: list[str] = []
    for path, live, module in walk(model) if names else ():
        paths.append(path)
        if path and saves(path, names) and not any(path == t or path.startswith(f"{t}.") for t in taken):
            taken.append(path)
            if inside := next((a for a in targets if a == live or a.startswith(f"{live}.")), None):
                raise UnsupportedLayerError(
                    f"'{inside}' would be adapted, and saved whole as part of '{path}', which ends as one of "
                    f"modules_to_save does: {sorted(names)}. Leave it out by exclude_modules."
                )
            found.append((live, module, trained_copy(module)))
    check_saved(names, paths, taken, lambda: other_names(model), loading)
    return found


def trained_copy(module: nn.Module) -> Any:
    """A copy of a module, which may be wrapped already; frozen until its wrapper is told to train it.

    Raises `UnsupportedLayerError` as the wrapper does.
    """
    original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    ModulesToSaveWrapper.check(original)
    return real_copy(original).requires_grad_(False)


def copies_in(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """(live path, copy) of every module that adapter `name` trains in full."""
    wrappers = [(live, m) for _, live, m in adapted(model) if isinstance(m, ModulesToSaveWrapper)]
    return [(live, wrapper.modules_to_save[name]) for live, wrapper in wrappers if name in wrapper.modules_to_save]


class TrainableTokensWrapper(Wrapper):
    """An embedding, some rows trained beside another method (`trainable_token_indices`): a Layer, one level down."""

    wraps = "token_adapter"
    merged_adapters: list[str] = []

    def __init__(self, layer: Layer):
        super().__init__()
        self.token_adapter = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    @property
    def original_module(self) -> nn.Module:
        """The frozen embedding."""
        return self.token_adapter.base_layer

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Saved key -> live key, below this module, of an adapter's tensors."""
        saved = "token_adapter.trainable_tokens_delta"
        return {} if self.token_adapter.tied else {saved: f"{saved}.{adapter_name}"}

    @property
    def weight(self) -> Tensor:
        """The weight that is in use; a head tied to the embedding reads it."""
        layer = self.token_adapter
        return layer.base.canonical(layer.operator().read()[0]) if layer.running else layer.base.leaf.weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in HOOKS or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.token_adapter if name in SWITCHES else self.token_adapter.base_layer, name)

    @property
    def _adapters(self) -> set[str]:
        return set(self.token_adapter.adapters)
