"""RandLoRA - full-rank adaptation with random bases. Albert et al., 2025, https://arxiv.org/abs/2502.00987, eq. 4.

    W' = W + alpha / r * sum_j B_j diag(l_j) A diag(g_j)        j = 1 .. n = ceil(min(in, out) / r)
    parameters                                                  ceil(min(in, out) / r) (r + min(in, out))

    A: (r, 1, min), B: (max, n, r), random, frozen and shared by all layers; l: (r, n), g: (n, min), l = 0 at the start

min and max are the smaller and the larger of `in` and `out`; where `in` is the larger, the sum is transposed. The
shared bases have the sizes of the largest layer; a smaller one uses their first entries. `factors` pairs them as PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Factored
from ..core.bases import dropout
from ..core.config import Probability, Size
from .projections import Projected, ProjectedConfig, uniform


@dataclass
class RandLoraConfig(ProjectedConfig, method="RANDLORA"):
    """Fields of RandLoRA. All adapters of a model have the same bases: `r`, `sparse` and all that says `projection`."""

    r: Size = 32  # rank of one base; the smaller, the more bases there are
    sparse: bool = False  # entries of A and B are -1, 0, 1 with probabilities 1/6, 2/3, 1/6
    very_sparse: bool = False  # the same with 1 / (2 sqrt(min)) in place of 1/6
    randlora_dropout: Probability = 0.0  # on the input, while training
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: Literal["none", "all", "randlora_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # False: l normal
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None


class RandLoRA(Projected, Factored, config=RandLoraConfig):
    prefix = "randlora_"
    pair = ("randlora_A", "randlora_B")
    with_layers, shares = True, False  # PEFT: whereas VeRA's are saved once
    must_agree = ("r", "projection_prng_key", "save_projection", "sparse", "very_sparse")

    @classmethod
    def shapes(cls, config: Any, inp: int, out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        small, large = sorted((inp, out))
        return (config.r, 1, small), (large, math.ceil(small / config.r), config.r)

    @classmethod
    def draw(
        cls, config: Any, A: tuple[int, ...], B: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if config.sparse or config.very_sparse:
            part = 1 / (2 * (math.sqrt(A[2]) if config.very_sparse else 3))
            a, b = (torch.rand(shape, generator=generator) for shape in (A, B))
            a, b = ((t > 1 - part).float() - (t < part).float() for t in (a, b))
        else:
            draw = lambda *shape: uniform(shape, generator, math.sqrt(5), torch.bfloat16)
            a = draw(*A)
            b = torch.cat([draw(B[0], 1, B[2]) for _ in range(B[1])], dim=1)
        return a / a.std(), b / b.std()

    def build(self) -> None:
        c = self.config
        small, large = sorted((self.base.in_features, self.base.out_features))
        n = math.ceil(small / c.r)
        self.r, self.scaling = c.r, self.initial_scaling()
        self.randlora_dropout = dropout(c.randlora_dropout)
        free = torch.randn(c.r, n)
        self.randlora_lambda = nn.Parameter(torch.zeros_like(free) if c.init_weights else free)
        self.randlora_gamma = nn.Parameter(torch.full((n, small), 1 / (max(n, small) if c.init_weights else large)))

    def initial_scaling(self) -> float:
        return self.config.randlora_alpha / self.config.r

    def factors(self) -> tuple[Tensor, Tensor]:
        l, g = self.randlora_lambda, self.randlora_gamma
        n, small = g.shape
        B = self.randlora_B[: max(self.base.in_features, self.base.out_features), :n].to(l).flatten(1)  # (max, n r)
        # PEFT: these are counted along n first, and B's columns along r first, so the pairs are not those of the paper
        A = Scaled.apply(self.randlora_A[..., :small].to(l), l, g, self.scaling).flatten(0, 1)  # (r n, min)
        return (B, A) if self.base.in_features == small else (A.t(), B.t())


class Scaled(torch.autograd.Function):
    """s a_ik l_ij g_jk (r, n, min). It keeps the factors, and its gradients are matrix products, which take less memory
    than sums of products.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, l: Tensor, g: Tensor, s: float) -> Tensor:
        return (l[..., None] * (s * g)).mul_(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *factors, ctx.s = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, l, g = ctx.saved_tensors
        grad = grad * a
        return None, torch.einsum("ijk,jk->ij", grad, ctx.s * g), ctx.s * torch.einsum("ijk,ij->jk", grad, l), None
