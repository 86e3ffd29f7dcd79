"""Weights that are elsewhere between passes, as accelerate's offloading leaves them.

Its hooks load a module's tensors when that module is called and put them away afterwards. Adapters also read tensors of
modules that nobody calls, so whatever they are to read is loaded here first. The hooks are known by their attributes;
accelerate is not imported.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedFeatureError

HOOKS = ("_hf_hook", "_old_forward")  # what accelerate sets on a module that has hooks: each module has its own


def hooked(module: nn.Module) -> bool:
    """Whether a hook of accelerate is on the module or on any inside it."""
    ahead: list[Any] = [module]
    for module in ahead:
        if module is not None:
            if "_hf_hook" in vars(module):
                return True
            ahead += module._modules.values()
    return False


def offloading(module: nn.Module) -> list[Any]:
    """The hooks that put the module's tensors elsewhere, and have not loaded them now."""
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False)]


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def check_biases(model: nn.Module) -> None:
    """Raise `UnsupportedFeatureError` where the model's own biases cannot be swapped: they are elsewhere."""
    if any(offloading(module) for module in model.modules()):
        raise UnsupportedFeatureError(
            "Trained biases (`bias`) are the model's own tensors, and those are offloaded, so they can be neither "
            "trained nor switched. Use bias='none', or load the model without offloading."
        )


def running_device(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where a tensor of the module itself is while that runs."""
    found = [hook.execution_device for hook in offloading(module) if tensor.is_meta]
    return torch.empty(0, device=found[0]).device if found else tensor.device


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer of a module is while it runs; the CPU if it has none."""
    for inner in module.modules():
        for tensor in (*inner.parameters(recurse=False), *inner.buffers(recurse=False)):
            return running_device(inner, tensor)
    return torch.device("cpu")


def loaded(module: nn.Module) -> AbstractContextManager[Any]:
    """`onload`, in less time where there is nothing to do."""
    return onload(module) if hooked(module) else nullcontext()


@contextmanager
def onload(*roots: nn.Module, keep: bool = False, recurse: bool = True) -> Iterator[None]:
    """While it is open, all tensors of modules are where they run. `keep`: what was written to them is kept."""
    loaded: list[tuple[nn.Module, Any]] = []
    kept = False
    try:
        for root in roots:
            for module in root.modules() if recurse and hooked(root) else (root,):
                for hook in offloading(module):
                    _take(module, hook)
                    hook.pre_forward(module)
                    hook.offload = False  # it leaves the tensors alone when the module is called meanwhile
                    loaded.append((module, hook))
        for module, hook in loaded if keep else ():
            for _, tensor in _tensors(module, hook):
                tensor.data = tensor.data.clone()  # where it came from may be the memory of tied weights too
        yield
        kept = keep
    finally:
        for module, hook in loaded if kept else ():
            hook.weights_map = {name: tensor.detach().cpu() for name, tensor in _tensors(module, hook)}
        for module, hook in reversed(loaded):
            hook.offload = True
            hook.post_forward(module, None)


def _take(module: nn.Module, hook: Any) -> None:
    """Let the hook have tensors that came to the module later: a new adapter's, in the container of those before."""
    new = {name: tensor.detach().cpu() for name, tensor in _tensors(module, hook) if not tensor.is_meta}
    if new and not isinstance(hook.weights_map, ChainMap):
        hook.weights_map = ChainMap({}, hook.weights_map)
    if new:
        hook.weights_map.maps[0].update(new)


def _tensors(module: nn.Module, hook: Any) -> Iterator[tuple[str, Tensor]]:
    """What the hook puts elsewhere."""
    yield from module.named_parameters(recurse=hook.place_submodules)
    if hook.offload_buffers:
        yield from module.named_buffers(recurse=hook.place_submodules)


def real_copy(module: Any) -> Any:
    """A deep copy of a module, with its tensors where they run. Hooks on the copy only move what it is given."""
    with onload(module):
        hooks = [h for m in module.modules() for h in _hooks(m)]
        maps = [getattr(h, name, None) for h in hooks for name in ("weights_map", "tied_params_map")]
        return copy.deepcopy(module, {id(m): {} for m in maps if m is not None})  # these hold the whole model
