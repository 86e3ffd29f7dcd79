"""Weights that are no parameter of their layer: it computes them from other tensors, each time it runs.

    torch.nn.utils.parametrize      weight_norm, spectral_norm, orthogonal, or a user's own: module.parametrizations
    a forward pre-hook              torch.nn.utils.weight_norm, spectral_norm, prune: module.weight_g, weight_orig, ...

Such a weight is read by computing it, as in eval mode: reading advances no power iteration. It is written by setting
what it is computed from, through `right_inverse`, and only if computing then gives the weight that was wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import MergeError
from .stored import put


def computed(module: nn.Module, name: str = "weight") -> Computed | None:
    """How `module` computes its tensor `name`; None when that is a parameter or a plain tensor of its own."""
    if name in module._parameters:
        return None
    lists: Any = module._modules.get("parametrizations")
    if lists is not None and name in lists:
        return Parametrized(lists[name], name)
    for hook in module._forward_pre_hooks.values():
        if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return Hooked(module, hook, name)
    return None


def plain_class(module: nn.Module) -> Any:
    """The class of a module, without what parametrising its tensors has put in between."""
    return parametrize.type_before_parametrizations(module) if parametrize.is_parametrized(module) else type(module)


class Computed:
    """A tensor that a module computes from others."""

    kind = ""  # what computes it, for messages

    def value(self) -> Tensor:
        """The tensor, computed without changing anything."""
        raise NotImplementedError

    def boxes(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Of each tensor that it is computed from: its key in the state dict, and the dict and key where it is."""
        raise NotImplementedError

    def invert(self, W: Tensor) -> None:
        """Set the tensors that it is computed from so that, if that is possible, W comes out."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it is computed from, by their keys in the module's state dict."""
        return {name: box[key] for name, box, key in self.boxes()}

    def copies(self) -> dict[str, Tensor]:
        """The same, in memory of their own."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def restore(self, tensors: Any) -> None:
        """Set the tensors that it is computed from to what they were, by name."""
        for name, tensor in self.tensors().items():
            put(tensor, tensors[name])
        with torch.no_grad():
            self.value()

    @torch.no_grad()
    def assign(self, W: Tensor) -> None:
        """Make W the tensor that is computed. Raises `MergeError`, with nothing changed, when it cannot be."""
        before = [(box, key, box[key], box[key].clone()) for _, box, key in self.boxes()]
        W, why = W.to(self.value().dtype), ""
        try:
            with torch.random.fork_rng(devices=[]):
                self.invert(W)
            eps = torch.finfo(W.dtype).eps
            off = (self.value() - W).abs() - 4 * eps * W.abs()
            if bool((off <= eps * W.abs().max()).all()):  # not so for NaN
                return
            why = "the weight that is computed then is another one"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        for box, key, tensor, old in before:
            box[key] = tensor
            put(tensor, old)
        self.value()
        raise MergeError(
            f"The layer computes its weight by {self.kind}, which cannot give the one that is to be written: {why}. "
            "Make the weight a plain parameter first, as `remove_parametrizations`, `remove_weight_norm` and the like "
            "of torch do, or write nothing to it: keep adapters unmerged, and use a start that leaves the weight alone."
        )


class Parametrized(Computed):
    """A tensor of a module parametrised by torch.nn.utils.parametrize."""

    def __init__(self, steps: Any, name: str):
        self.steps, self.name = steps, name
        self.kind = " and ".join(type(step).__name__.lstrip("_") for step in steps)

    def value(self) -> Tensor:
        with evaluating(*self.steps.modules()):
            return self.steps()

    def boxes(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        for path, module in self.steps.named_modules(prefix=f"parametrizations.{self.name}"):
            for box in module._parameters, module._buffers:
                yield from ((f"{path}.{key}", box, key) for key in box if box[key] is not None)

    def invert(self, W: Tensor) -> None:
        steps, found = self.steps, W
        with evaluating(*steps.modules()):
            for step in reversed(steps):
                found = step.right_inverse(found)
        values = [found] if isinstance(found, Tensor) else list(found)
        names = ["original"] if steps.is_tensor else [f"original{i}" for i in range(steps.ntensors)]
        originals = [getattr(steps, name) for name in names]
        for original, value in zip(originals, values, strict=True):
            if original.shape != value.shape:
                raise ValueError(f"right_inverse gives {tuple(value.shape)} for an original {tuple(original.shape)}")
            put(original, value)


class Hooked(Computed):
    """A tensor that a forward pre-hook of torch's own sets before the module runs."""

    def __init__(self, module: nn.Module, hook: Any, name: str):
        self.module, self.hook, self.name = module, hook, name
        self.kind = type(hook).__name__

    def value(self) -> Tensor:
        with evaluating(self.module):
            self.hook(self.module, ())
        return getattr(self.module, self.name)

    def boxes(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        for box in self.module._parameters, self.module._buffers:
            yield from ((key, box, key) for key in box if key.startswith(f"{self.name}_") and box[key] is not None)

    def invert(self, W: Tensor) -> None:
        own = self.module._parameters
        if (g := own.get(f"{self.name}_g")) is not None:
            put(g, torch.norm_except_dim(W, 2, self.hook.dim))
        direction: Any = own.get(f"{self.name}_v" if g is not None else f"{self.name}_orig")
        put(direction, W)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """While it is open, the modules are in eval mode, but nothing inside them."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
