"""Matrices of which only a few entries are set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.bases import Base
from ..core.errors import ConfigError
from ..core.kinds import base_of


def random_positions(base: Base, n: int, seed: int) -> Tensor:
    """Rows and columns (2, n) of n different entries of a layer's weight (out, in), the same on every device.

    Raises `ConfigError` unless 0 < n <= out * in.
    """
    n_out, n_in = base.out_features, base.in_features
    if not 0 < n <= n_out * n_in:
        raise ConfigError(f"`n_frequency` must be above 0 and at most {n_out} * {n_in}, the size of W, not {n}.")
    flat = torch.randperm(n_out * n_in, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:n]
    return torch.stack([flat // n_in, flat % n_in])


def dense(values: Tensor, positions: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix (rows, columns) with `values` (n,) at `positions` (2, n) and 0 elsewhere."""
    return values.new_zeros(rows, columns).index_put_(tuple(positions.long()), values)


def added(W: Tensor, values: Tensor, flat: Tensor) -> Tensor:
    """W with `values` (n,) added at positions (n,) of the flattened W."""
    W = W.to(torch.promote_types(W.dtype, values.dtype))
    return W.flatten().index_add(0, flat, values.to(W.dtype)).view(W.shape)


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """A mask (out, in) with r (in + out) entries True, chosen by `random_seed`; None stands for one fixed seed, too."""
    base = base_of(base_layer)
    assert base is not None
    generator = torch.Generator("cpu")
    if random_seed is not None:
        generator.manual_seed(random_seed)
    order = torch.randperm(base.out_features * base.in_features, generator=generator, device="cpu")
    mask = torch.zeros(base.out_features * base.in_features, dtype=torch.bool, device="cpu")
    mask[order[: r * (base.in_features + base.out_features)]] = True
    return mask.view(base.out_features, base.in_features)
