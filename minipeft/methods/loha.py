"""LoHa - Low-Rank Hadamard Product. FedPara, Hyeon-Woo et al., 2021, https://arxiv.org/abs/2108.06098, propositions 1
and 3; LyCORIS, Yeh et al., 2023, https://arxiv.org/abs/2309.14859.

    W' = W + (alpha / r) (A1 B1) * (A2 B2)      A_i: (out, r), B_i: (r, width), elementwise product, B2 = 0 at the start
    W' = W + (alpha / r) D1 * D2                D_i = T_i x_1 A_i x_2 B_i, with use_effective_conv2d on a kernel
                                                T_i: (r, r, *kernel), A_i: (r, out), B_i: (r, in / groups)
    parameters                                  2 r (in + out)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Rows
from ..maths.draw import uniform
from .lycoris import Lycoris, LycorisConfig, core_shape, tucker


@dataclass
class LoHaConfig(LycorisConfig, method="LOHA"):
    """Fields of LoHa."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True  # False: B2 random, too
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None


class LoHa(Lycoris, config=LoHaConfig):
    prefix = "hada_"
    rescales = True

    def factors(self, r: int) -> None:
        (out, inp, *_), kernel, zero = self.base.shape, self.kernel, self.config.init_weights
        for i in ("1", "2"):
            a, b = ((r, out), (r, inp)) if kernel else ((out, r), (r, math.prod(self.base.shape[1:])))
            setattr(self, f"hada_w{i}_a", uniform(*a))
            setattr(self, f"hada_w{i}_b", uniform(*b, zero=zero and i == "2"))
        for i in ("1", "2") if kernel else ():
            setattr(self, f"hada_t{i}", uniform(*core_shape(r, kernel)))

    def product(self) -> Tensor:
        a, b, c, d = self.hada_w1_a * self.scaling, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        if self.kernel:
            return tucker(self.hada_t1, a, b) * tucker(self.hada_t2, c, d)  # (out, in / groups, *kernel)
        return Hadamard.apply(a, b, c, d)  # (out, width)

    def delta_rows(self) -> Rows:
        a, b, c, d = self.hada_w1_a * self.scaling, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        return lambda rows: (a[rows] @ b) * (c[rows] @ d)


class Hadamard(torch.autograd.Function):
    """(A1 B1) * (A2 B2), of which only the factors are kept for the gradients: a product costs little to form again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return (a @ b) * (c @ d)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b, c, d = ctx.saved_tensors
        one, two = grad * (c @ d), grad * (a @ b)
        return one @ b.t(), a.t() @ one, two @ d.t(), c.t() @ two
