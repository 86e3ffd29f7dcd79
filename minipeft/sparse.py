"""Matrices of which only a few entries are set."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Base
from .errors import ConfigError


def random_positions(base: Base, n: int, seed: int) -> Tensor:
    """Rows and columns (2, n) of n different entries of a layer's weight (out, in), the same on every device.

    Raises `ConfigError` unless 0 < n <= out * in.
    """
    if not 0 < n <= base.out * base.inp:
        raise ConfigError(f"`n_frequency` must be above 0 and at most {base.out} * {base.inp}, the size of W, not {n}.")
    flat = torch.randperm(base.out * base.inp, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:n]
    return torch.stack([flat // base.inp, flat % base.inp])


def dense(values: Tensor, positions: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix (rows, columns) with `values` (n,) at `positions` (2, n) and 0 elsewhere."""
    return values.new_zeros(rows, columns).index_put(tuple(positions.long()), values)
