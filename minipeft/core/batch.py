"""Mixed batches: each sample has an adapter of its own.

The frozen layer runs once for the whole batch, wherever adapters give it their own input, and each adapter goes on from
its rows of that. The products B A of all adapters that are only that are batched: factors (n, r, in) and (n, out, r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import BatchError

if TYPE_CHECKING:
    from .layer import Layer

BASE = "__base__"  # in a mixed batch: a sample for the bare model


def run_groups(x: Tensor, groups: dict[str, list[int]], run: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Rows of the batch x through `run(name, rows)`, put back in their order."""
    return joined([(rows, tensor(run(name, take(x, rows)))) for name, rows in groups.items()])


def run_layer(layer: Layer, x: Tensor, groups: dict[str, list[int]], *args: Any, **kwargs: Any) -> Tensor:
    """Output of an adapted layer for the batch x, of which each group's rows take the adapter of that name."""
    once = Once(layer, x, groups, *args, **kwargs)
    now, parts = layer.context.now, []
    products: dict[torch.dtype, list[tuple[list[int], Any]]] = {}
    bare: list[int] = []
    for name, rows in groups.items():
        adapter = layer.adapters.get(name)
        if adapter is None:
            bare += rows
        elif (product := adapter.low_rank()) is not None:
            products.setdefault(product[0].dtype, []).append((rows, product))
        else:
            with layer.context.telling(**now.of_rows(rows, len(x))):
                inner = OnRows(once, name, rows)
                parts.append((rows, tensor(adapter.forward(inner.x, inner, *args, **inner.names, **kwargs))))
    for same in products.values():
        parts.append(add_products(once(), x, same))
    if bare:
        parts.append((bare, take(once(), bare)))
    return joined(parts)


class Once:
    """A layer without its own adapters, which runs at most once for the whole batch x."""

    def __init__(self, layer: Layer, x: Tensor, groups: dict[str, list[int]], *args: Any, **kwargs: Any):
        self.layer, self.x, self.groups, self.args, self.kwargs = layer, x, groups, args, kwargs
        self.y: Tensor | None = None

    def names(self, rows: Sequence[int]) -> dict[str, Any]:
        """The argument that tells a layer of another method inside which adapter each of these rows takes."""
        if self.layer.base.inside is None:
            return {}
        by_row = {row: name for name, rows in self.groups.items() for row in rows}
        return {"adapter_names": [by_row[row] for row in rows]}

    def __call__(self) -> Tensor:
        if self.y is None:
            self.y = tensor(self.layer.base(self.x, *self.args, **self.names(range(len(self.x))), **self.kwargs))
        return self.y


class OnRows:
    """The operator inside an adapter that has some rows of a mixed batch; on those rows it need not run again."""

    def __init__(self, once: Once, name: str, rows: list[int]):
        self.once, self.rows, self.op = once, rows, once.layer.inside([name])
        self.x, self.names = take(once.x, rows), once.names(rows)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return take(self.once(), self.rows) if x is self.x else self.op(x, *args, **kwargs)

    def read(self) -> tuple[Any, Any]:
        return self.op.read()


def add_products(y: Tensor, x: Tensor, groups: list[tuple[list[int], Any]]) -> tuple[list[int], Tensor]:
    """(rows, y + s B (A x)) of all rows in `groups`, each with the s, A (r, in) and B (out, r) of its group.

    Each group is cut into pieces of k rows, the last one filled up, so that all pieces make one product.
    """
    k = -(-sum(len(own) for own, _ in groups) // len(groups))
    pieces = [(own[i : i + k], product) for own, product in groups for i in range(0, len(own), k)]
    A, B, s = stacked([product for _, product in pieces])  # (n, r, in), (n, out, r), (n, 1, 1)
    filled = [row for own, _ in pieces for row in own + own[:1] * (k - len(own))]
    x, y = take(x, filled), take(y, filled)
    tokens = k * x[0, ..., 0].numel()
    h = x.to(A.dtype).reshape(len(pieces), tokens, x.shape[-1]) @ A.mT * s  # (n, tokens, r)
    start = y.reshape(len(pieces), tokens, y.shape[-1])
    added = torch.baddbmm(start, h, B.mT) if h.dtype == y.dtype else (start + h @ B.mT).to(y.dtype)
    real = [k * n + i for n, (own, _) in enumerate(pieces) for i in range(len(own))]
    return [filled[i] for i in real], take(added.view(y.shape), real)


def stacked(products: list[tuple[Tensor, Tensor, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (n, r, in) and (n, out, r) and scales (n, 1, 1) of several products, ranks filled up with zeros."""
    r, scales = max(len(A) for A, _, _ in products), [s for _, _, s in products]
    A = torch.stack([A if len(A) == r else F.pad(A, (0, 0, 0, r - len(A))) for A, _, _ in products])
    B = torch.stack([B if B.shape[1] == r else F.pad(B, (0, r - B.shape[1])) for _, B, _ in products])
    if any(isinstance(scale, Tensor) for scale in scales):
        s = torch.stack([torch.as_tensor(scale, dtype=A.dtype, device=A.device) for scale in scales])
    else:
        s = torch.tensor(scales, dtype=A.dtype, device=A.device)
    return A, B, s.view(-1, 1, 1)


def take(t: Tensor, rows: list[int]) -> Tensor:
    """Those rows of t."""
    if rows == list(range(len(t))):
        return t
    return t.index_select(0, torch.tensor(rows, device=t.device))


def joined(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """The batch whose rows are given in parts, in the dtype of the first one."""
    (rows, y), *rest = parts
    if rest:
        rows = [row for own, _ in parts for row in own]
        y = torch.cat([part.to(y.dtype) for _, part in parts])
    return take(y, sorted(range(len(rows)), key=rows.__getitem__))


def tensor(output: Any) -> Tensor:
    """What a layer returned, which must be one tensor."""
    if not isinstance(output, Tensor):
        raise BatchError(f"Mixed batches need layers that return a tensor, got a {type(output).__name__}.")
    return output
