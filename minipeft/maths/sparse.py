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
    if not 0 < n <= base.out * base.inp:
        raise ConfigError(f"`n_frequency` must be above 0 and at most {base.out} * {base.inp}, the size of W, not {n}.")
    flat = torch.randperm(base.out * base.inp, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:n]
    return torch.stack([flat // base.inp, flat % base.inp])


def dense(values: Tensor, positions: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix (rows, columns) with `values` (n,) at `positions` (2, n) and 0 elsewhere."""
    return values.new_zeros(rows, columns).index_put(tuple(positions.long()), values)


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """A mask (out, in) with r (in + out) entries True, chosen by `random_seed`; None stands for one fixed seed, too."""
    base = base_of(base_layer)
    assert base is not None
    generator = torch.Generator("cpu")
    if random_seed is not None:
        generator.manual_seed(random_seed)
    order = torch.randperm(base.out * base.inp, generator=generator, device="cpu")
    mask = torch.zeros(base.out * base.inp, dtype=torch.bool, device="cpu")
    mask[order[: r * (base.inp + base.out)]] = True
    return mask.view(base.out, base.inp)
