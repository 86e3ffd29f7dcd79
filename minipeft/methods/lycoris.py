"""What LoHa and LoKr share: the LyCORIS family. Yeh et al., 2023, https://arxiv.org/abs/2309.14859.

    W' = W + (alpha / r) D       D in the shape of W
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Delta
from ..core.config import PeftConfig, Positive, Share
from ..core.targets import pattern_value


@dataclass
class LycorisConfig(PeftConfig, optional=("rank_dropout",)):
    """The fields that LoHa and LoKr have in common."""

    rank_pattern: dict[str, Positive] | None = field(default_factory=dict)  # path or regular expression -> r
    alpha_pattern: dict[str, int | float] | None = field(default_factory=dict)
    r: Positive = 8  # rank
    alpha: int | float = 8
    rank_dropout: Share = 0.0  # share of the rows of D that are left out, while training
    module_dropout: Share = 0.0  # chance that the whole adapter is left out, while training
    use_effective_conv2d: bool = False  # on convolutions: factors of their own for the kernel


class Lycoris(Delta):
    """W' = W + (alpha / r) D. Gives `factors` (the parameters) and `product` (alpha / r times D, of any shape)."""

    bases = ("Linear", "Conv1D", "Conv", "Embedding")

    def factors(self, r: int) -> None:
        """Create and initialise the parameters."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """(alpha / r) D."""
        raise NotImplementedError

    @property
    def rescales(self) -> bool:
        """Whether the rows that rank dropout leaves grow by as much as the others take away."""
        raise NotImplementedError

    def build(self) -> None:
        c = self.config
        self.r = pattern_value(c.rank_pattern, self.path, c.r)
        self.alpha = pattern_value(c.alpha_pattern, self.path, c.alpha)
        self.scaling = self.initial_scaling()
        self.rank_dropout, self.module_dropout = c.rank_dropout, c.module_dropout
        self.factors(self.r)

    def initial_scaling(self) -> float:
        return self.alpha / self.r

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel sizes that get factors of their own: those of a convolution, with `use_effective_conv2d`."""
        kernel = self.base.shape[2:]
        return kernel if self.config.use_effective_conv2d and math.prod(kernel) > 1 else ()

    def delta(self) -> Tensor:
        return self.product().reshape(self.base.shape)

    @property
    def by_weight(self) -> bool:
        return not (self.layer.training and self.rank_dropout)

    def branch(self, x: Tensor) -> Tensor:
        dW = self.delta()
        if self.layer.training and self.rank_dropout:
            keep = (torch.rand(len(dW)) > self.rank_dropout).to(dW)  # (out,)
            if self.rescales:
                keep = keep / keep.mean().clamp(min=1 / len(dW))
            dW = dW * keep.view(-1, *[1] * (dW.dim() - 1))
        return self.base.apply(self.cast(x, dW) if self.base.reads_vectors else x, dW)

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.layer.training:
            chance = torch.rand(1)  # PEFT: drawn also without module_dropout
            if self.module_dropout and chance <= self.module_dropout:
                return inner(x, *args, **kwargs)
        return super().forward(x, inner, *args, **kwargs)


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_ij t[i, j, ...] a[i, p] b[j, q]: core t (r, r, *kernel), factors a (r, p), b (r, q) -> (p, q, *kernel)."""
    return torch.einsum("ij...,ip,jq->pq...", t, a, b)


def core_shape(r: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `tucker`'s core."""
    return (r, r, *kernel, 1) if len(kernel) == 1 else (r, r, *kernel)  # PEFT: Conv1d as a Conv2d of width 1


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = dimension and m <= n: the m nearest to the square root, but at most `factor` unless that is -1.

    A `factor` that divides is taken as it is, also above the square root: then m > n.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    top = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    m = max(d for d in range(1, top + 1) if dimension % d == 0)
    return m, dimension // m
