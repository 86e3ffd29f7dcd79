"""A model's modules under the names that they had before any adapter came."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, checkpointing
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # their child is called `module`


class Wrapper(nn.Module):
    """What adapters put in the place of a module. Its other children are theirs; `walk` passes them over."""

    wraps: ClassVar[str]  # the name of the child that is the module

    def unwrapped(self, names: list[str]) -> nn.Module:
        """What is to stand here when it goes, and the effect of adapters `names` is to stay."""
        return getattr(self, self.wraps)


def walk(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(path, live path, module) of a model, with each module once and nothing that adapters brought.

    `path` is what the module was called before any adapter came; `live` is what it is called now. A wrapper around a
    module (see `WRAPPERS`) is no module of its own: it is not in `path`, and it is passed over.
    """
    seen: set[int] = set()
    ahead: list[tuple[str, str, Any]] = [("", "", model)]  # the next one last
    while ahead:
        path, live, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        head, live_head = path and f"{path}.", live and f"{live}."
        if (wrapped := wrapped_in(module)) is not None:
            ahead.append((path, live_head + wrapped, module._modules[wrapped]))
            continue
        yield path, live, module
        if isinstance(module, Wrapper):
            ahead.append((path, live_head + module.wraps, getattr(module, module.wraps)))
        elif module._modules:
            children = [(head + n, live_head + n, child) for n, child in module._modules.items() if child is not None]
            ahead += reversed(children)


def other_names(model: nn.Module) -> dict[str, str]:
    """Further paths of modules that a model has in several places, each with the path that `walk` gives it."""
    found: dict[str, str] = {}
    paths: dict[int, str] = {}
    for path, _, module in walk(model):
        paths.setdefault(id(module), path)
    for path, _, module in walk(model):
        for name, child in module._modules.items() if not isinstance(module, Wrapper) else ():
            other = f"{path}.{name}" if path else name
            if child is not None and paths[id(child)] != other:
                found[other] = paths[id(child)]
    return found


def wrapped_in(module: nn.Module) -> str | None:
    """The name of the one child that a wrapper stands around; None for what is no wrapper."""
    children = module._modules
    if len(children) != 1:
        return None
    (name,) = children
    return name if name in WRAPPERS or (name == "module" and isinstance(module, PARALLEL)) else None


def place_of(live: str) -> str:
    """Where another module has to be put to stand in the place of the one at `live`.

    That is outside a wrapper of torch.compile, which would go on with what it has compiled.
    """
    while live.endswith("._orig_mod"):
        live = live.removesuffix("._orig_mod")
    return live


class PlainNames:
    """Live names of a model's modules and tensors without what wrappers add to them: `names(live)`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.wrapped: set[str] | None = None  # the live names of what stands in a wrapper, once they are needed

    def __call__(self, live: str) -> str:
        parts = live.split(".")
        if not any(part in WRAPPERS or part == "module" for part in parts):
            return live
        if self.wrapped is None:
            inside = ((name, wrapped_in(module)) for name, module in self.model.named_modules())
            self.wrapped = {f"{name}.{child}".lstrip(".") for name, child in inside if child is not None}
        return ".".join(part for i, part in enumerate(parts, 1) if ".".join(parts[:i]) not in self.wrapped)


def put_at(model: nn.Module, live: str, module: nn.Module) -> None:
    """Put `module` where a model has another, by live path (torch has `set_submodule` since 2.5)."""
    parent, _, last = place_of(live).rpartition(".")
    model.get_submodule(parent)._modules[last] = module
