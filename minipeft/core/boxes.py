"""Boxes: where the tensors and modules of adapters stand, under PEFT's live names (`layer.lora_A["default"].weight`).

A box belongs to a slot of a layer, or of the model, and holds what each adapter has there. The adapter looks at its own
part of all boxes as at its own parameters, buffers and modules: through a `Column`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

LOW_PRECISION = frozenset(
    getattr(torch, name)
    for name in "float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu".split()
    if hasattr(torch, name)
)


def contents(box: Any) -> Any:
    """What a box holds, as a plain dict by adapter name."""
    if isinstance(box, nn.ModuleDict):
        return box._modules
    return box._parameters if isinstance(box, nn.ParameterDict) else box._buffers


class BufferDict(nn.Module):
    """A dict of tensors that move with the module; in its state dict only when `persistent`."""

    _buffers: dict[str, Tensor]  # type: ignore[assignment]  # none is None

    def __init__(self, buffers: dict[str, Tensor] | None = None, persistent: bool = False):
        super().__init__()
        self.persistent = persistent
        for key, value in (buffers or {}).items():
            self[key] = value

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.register_buffer(key, value, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def update(self, buffers: Any) -> None:
        """Take over tensors by name: of a dict, another BufferDict or pairs."""
        for key, value in buffers.items() if hasattr(buffers, "items") else buffers:
            self[key] = value

    def keys(self) -> Iterable[str]:
        return self._buffers.keys()

    def values(self) -> Iterable[Tensor]:
        return self._buffers.values()

    def items(self) -> Iterable[tuple[str, Tensor]]:
        return self._buffers.items()


class Slots(nn.Module):
    """Containers keyed by adapter name, under PEFT's names: `self.lora_A["default"]`."""

    adapter_layer_names: tuple[str, ...] = ()  # slots with trainable parameters
    other_param_names: tuple[str, ...] = ()  # slots with anything else

    def put(self, slot: str, name: str, value: Any, persistent: bool = False) -> None:
        """Store `value` for adapter `name`; the first value of a slot decides what kind of container it is."""
        if isinstance(value, nn.Module):
            if slot not in self._modules:
                self.register(slot, nn.ModuleDict(), trained=bool(value._parameters or value._modules))
            inside: Any = self._modules[slot]
            inside._modules[name] = value
        elif isinstance(value, Tensor):
            if slot not in self._modules:
                trained = isinstance(value, nn.Parameter)
                self.register(slot, nn.ParameterDict() if trained else BufferDict(persistent=persistent), trained)
            box: Any = self._modules[slot]
            box[name] = value  # the container sees to what it needs
        else:
            self.put_values(name, {slot: value})

    def put_values(self, name: str, values: dict[str, Any]) -> None:
        """Store plain values (neither tensors nor modules) for adapter `name`, by slot."""
        own = self.__dict__
        for slot, value in values.items():
            if slot not in own:
                self.register(slot, {}, trained=False)
            own[slot][name] = value

    def register(self, slot: str, box: Any, trained: bool) -> None:
        """Add the container of a slot."""
        own = self.__dict__
        (own["_modules"] if isinstance(box, nn.Module) else own)[slot] = box
        listing = "adapter_layer_names" if trained else "other_param_names"
        own[listing] = (*getattr(self, listing), slot)

    def contents(self, slot: str) -> Any:
        """What the container of a slot holds, as a plain dict by adapter name; None when there is no such slot."""
        box = self._modules.get(slot, self.__dict__.get(slot))
        return contents(box) if isinstance(box, nn.Module) else box

    def take(self, slot: str, name: str) -> Any:
        """The value of adapter `name`. Raises `AttributeError` when there is none."""
        try:
            return self.contents(slot)[name]
        except (KeyError, TypeError):
            raise AttributeError(f"adapter {name!r} has no {slot!r}") from None

    def drop(self, name: str) -> None:
        """Forget everything of adapter `name`."""
        for slot in self.adapter_layer_names + self.other_param_names:
            box = getattr(self, slot)
            if name in box:
                del box[name]

    def boxes(self, name: str) -> list[tuple[str, Any, Any]]:
        """(slot, container, value) of every module slot that adapter `name` has."""
        found = []
        for slot in self.adapter_layer_names + self.other_param_names:
            box = self._modules.get(slot)
            if box is not None and name in (held := contents(box)):
                found.append((slot, box, held[name]))
            elif box is not None and name in (computed := cast(Any, getattr(box, "parametrizations", {}))):
                found.append((slot, computed, computed[name]))
        return found

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(slot, tensor) of every tensor of adapter `name`."""
        for slot, _, value in self.boxes(name):
            if isinstance(value, nn.Module):
                yield from ((slot, tensor) for tensor in (*value.parameters(), *value.buffers()))
            else:
                yield slot, value

    def upcast(self, name: str) -> None:
        """float16, bfloat16 and float8 tensors of adapter `name` become float32, which training needs."""
        for _, tensor in self.tensors(name):
            if tensor.dtype in LOW_PRECISION:
                tensor.data = tensor.data.float()


class Column(MutableMapping[str, Any]):
    """What one adapter has in its layer's boxes of one kind, by slot: its `_parameters`, `_buffers` or `_modules`."""

    __slots__ = ("box", "kind", "layer", "name")

    def __init__(self, layer: Callable[[], Any], name: str, kind: str):
        self.layer, self.name, self.kind, self.box = layer, name, kind, BOXES[kind]

    def held(self, slot: str) -> Any:
        """What the box of that slot holds, by adapter name; empty when there is no such box of this kind."""
        box = self.layer()._modules.get(slot) if slot not in NO_SLOTS else None
        if self.kind == "_modules" and hasattr(box, "parametrizations"):
            return cast(Any, box).parametrizations._modules  # of bare tensors that are computed
        return getattr(box, self.kind) if isinstance(box, self.box) else {}

    def __getitem__(self, slot: str) -> Any:
        return self.held(slot)[self.name]

    def __setitem__(self, slot: str, value: Any) -> None:
        held = self.held(slot)
        if self.name in held:
            held[self.name] = value
        else:
            self.layer().put(slot, self.name, value)

    def __delitem__(self, slot: str) -> None:
        del self.held(slot)[self.name]

    def __contains__(self, slot: object) -> bool:
        return self.name in self.held(cast(str, slot))

    def __iter__(self) -> Iterator[str]:
        return iter([slot for slot in self.layer()._modules if slot in self])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Any]:
        """A plain dict with the same content, which torch asks for."""
        return dict(self)


BOXES = {"_parameters": nn.ParameterDict, "_buffers": BufferDict, "_modules": nn.ModuleDict}
HOLDERS: Any = (dict, *BOXES.values())  # of what adapters have in a slot: plain values stand in a dict
NO_SLOTS = ("base_layer", "backup")  # of a layer's modules those that are no boxes
