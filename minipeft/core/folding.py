"""W' and b' from W and b, as merging makes them: in float32, in one piece or part by part, and looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .adapter import Activation, Adapter, Delta, Factored, Parts
from .errors import MergeError
from .stored import sharded, whole

KINDS = (Delta, Factored, Activation)  # which make parts of what a method states, whatever that is
PARTS, PART = 32, 1 << 15  # a weight is folded in so many parts, or in fewer, of so many numbers


def tensors(pair: Any) -> Iterator[Tensor]:
    for part in pair:
        if part is not None:
            yield from part.values() if isinstance(part, dict) else (part,)


def finite(pair: Any) -> bool:
    """Whether all numbers of (W, b) are finite."""
    return all(bool(torch.isfinite(upcast_tensor(t)).all()) for t in tensors(pair))


def broken(adapter: Adapter) -> MergeError:
    return MergeError(
        f"NaNs detected in the merged weights. Adapter {adapter.name} seems to be broken (safe_merge)."
    )


def unfit(adapter: Adapter) -> MergeError:
    return MergeError(
        f"The merged weights with adapter {adapter.name} do not fit what {adapter.path!r} stores them in "
        f"({adapter.base.dtype}): some would become infinite or NaN (safe_merge)."
    )


def in_parts(adapters: list[Adapter], b: Tensor | None) -> Parts | None:
    """`Adapter.in_parts` of adapters one around the other; None where that cannot be done with all of them at once."""
    found: list[Parts] = []
    for adapter in adapters:
        parts = adapter.in_parts(found[-1].bias if found else b) if goes_together(type(adapter)) else None
        if parts is None or parts.axis != (found or [parts])[0].axis:
            return None
        found.append(parts)
    if len(found) == 1:
        return found[0]

    def fold(W: Tensor, part: slice) -> Tensor:
        W = W.clone()  # a later adapter may read the same part of the frozen weight
        for parts in found:
            W = parts.fold(W, part)
        return W

    return Parts(fold, found[-1].bias, found[0].axis, math.lcm(*(parts.step for parts in found)))


def goes_together(cls: type[Adapter]) -> bool:
    """Whether a class's parts are those of its `fold`, and not of one that a class derived from states anew."""

    def nearest(*names: str) -> int:
        return next(i for i, kind in enumerate(cls.__mro__) if not vars(kind).keys().isdisjoint(names))

    parts = nearest("in_parts", "delta_rows")
    return cls.__mro__[parts] in KINDS or parts <= nearest("fold", "delta", "factors", "pre", "post", "adjoint")


def at_once(adapters: list[Adapter], W: Tensor, b: Tensor | None) -> Parts:
    """The parts of what has been folded as a whole."""
    for adapter in adapters:
        W, b = adapter.fold(W, b)
    return Parts(lambda _, rows: W[rows], b)


def part_by_part(parts: Parts, W: Tensor, trial: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of W, what becomes of it) for all of W; unless for `trial`, the part may be written to already."""
    (n, other), axis = (W.shape, 0) if parts.axis == 0 else (W.shape[::-1], 1)
    size = max(W.numel() // PARTS, PART) // max(other, 1) + 1  # rows or columns at a time
    size += -size % parts.step
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        old = W[part] if axis == 0 else W[:, part]
        yield old, parts.fold(upcast_tensor(old.clone() if trial else old), part)


def near(got: Tensor | None, want: Tensor) -> bool:
    """Whether both are the same but for rounding, and for what a merge rounds."""
    if got is None or got.shape != want.shape:
        return False
    off = (got - want).abs().max().float()
    return bool(off <= max(1e-3, 16 * torch.finfo(want.dtype).eps) * want.abs().max().float())


def upcast_pair(pair: Any) -> Any:
    """(W, b) in at least float32."""
    return tuple({k: upcast_tensor(t) for k, t in p.items()} if isinstance(p, dict) else upcast_tensor(p) for p in pair)


def upcast_tensor(t: Any) -> Any:
    if t is None or t.dtype == torch.float32 or not t.is_floating_point():
        return t
    return t if t.dtype.itemsize > 4 else t.float()


@contextmanager
def upcast(adapter: Adapter) -> Iterator[None]:
    """The adapter as it is merged: no dropout, whole tensors, and float32 for low precision, so it rounds only once."""
    modules = [(module, module.training) for module in adapter.modules()]
    boxes: list[Any] = [box for module, _ in modules for box in (module._parameters, module._buffers)]
    held = [(box, key) for box in boxes for key, tensor in box.items() if tensor is not None]
    parts = [(box, key, box[key]) for box, key in held if sharded(box[key])]
    for box, key, tensor in parts:
        box[key] = whole(tensor)
    narrow = [(t, t.data) for t in (box[key] for box, key in held) if t.dtype in (torch.float16, torch.bfloat16)]
    for tensor, data in narrow:
        tensor.data = data.float()
    adapter.eval()
    try:
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data
        for box, key, tensor in parts:
            box[key] = tensor
        for module, mode in modules:
            module.training = mode
