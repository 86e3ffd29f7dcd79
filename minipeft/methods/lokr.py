"""LoKr - Low-Rank Kronecker Product. LyCORIS, Yeh et al., 2023, https://arxiv.org/abs/2309.14859.

    W' = W + (alpha / r) W1 (x) W2       W1: (a, c), W2: (b, d, *kernel), a b = out, c d = in, Kronecker product
    W1 = A1 B1                           A1: (a, r), B1: (r, c), with decompose_both
    W2 = A2 B2                           A2: (b, r), B2: (r, d * taps), where r is below half of the larger side
       = T x_1 A2 x_2 B2                 T: (r, r, *kernel), A2: (r, b), B2: (r, d), with use_effective_conv2d
    parameters                           decompose_factor^2 + r (in + out) / decompose_factor

W1 (or A1) is 0 at the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..maths.draw import uniform
from .lycoris import Lycoris, LycorisConfig, core_shape, tucker
from .lycoris import factorization as factorization

ZERO = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}  # by init_weights


@dataclass
class LoKrConfig(LycorisConfig, method="LOKR"):
    """Fields of LoKr."""

    decompose_both: bool = False  # W1 may be a product, too
    decompose_factor: int = -1  # a and c: this if it divides, else the next smaller divisor; -1: near the square root
    rank_dropout_scale: bool = False  # the rows that rank dropout leaves grow by as much as the others take away
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["lycoris"] = True  # "lycoris": W2 starts at 0 instead of W1; False: neither
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.decompose_factor != -1:
            self.require_positive("decompose_factor")


class LoKr(Lycoris, config=LoKrConfig):
    prefix = "lokr_"

    @property
    def rescales(self) -> bool:
        return self.rank_dropout_scale

    def factors(self, r: int) -> None:
        c, (out, inp, *taps) = self.config, self.base.shape
        self.rank_dropout_scale = c.rank_dropout_scale
        (a, b), (m, n) = factorization(out, c.decompose_factor), factorization(inp, c.decompose_factor)
        shapes: dict[str, tuple[int, ...]] = {}
        if c.decompose_both and r < max(a, m) / 2:
            shapes |= {"lokr_w1_a": (a, r), "lokr_w1_b": (r, m)}
        else:
            shapes |= {"lokr_w1": (a, m)}
        if r >= max(b, n) / 2:
            shapes |= {"lokr_w2": (b, n, *taps)}
        elif self.kernel:
            shapes |= {"lokr_w2_a": (r, b), "lokr_w2_b": (r, n), "lokr_t2": core_shape(r, self.kernel)}
        else:
            shapes |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, n * math.prod(taps))}
        for slot, shape in shapes.items():
            setattr(self, slot, uniform(*shape, zero=slot in ZERO[c.init_weights]))

    def product(self) -> Tensor:
        w1 = self.lokr_w1 if self.has("lokr_w1") else self.lokr_w1_a @ self.lokr_w1_b  # (a, c)
        if self.has("lokr_t2"):
            w2 = tucker(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)  # (b, d, *kernel)
        else:
            w2 = self.lokr_w2 if self.has("lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b  # (b, d * taps)
        # PEFT: on a Conv1d, a full W2 keeps its three axes, so that W1's meet those of d and of the kernel
        return torch.kron(w1 * self.scaling, w2 if w2.dim() == 3 else w2.flatten(1))
