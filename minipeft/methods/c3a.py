"""C3A - Circular Convolution Adaptation. Chen et al., 2024, https://arxiv.org/abs/2407.19342, section 3.

    W' = W + C / in              C: (out / b, in / b) blocks, C_ij (b, b) circulant with first row k_ij
                                 k: (out / b, in / b, b)
    (C x)_i = sum over j of F^-1(F(x_j) * conj(F(k_ij)))        F: discrete Fourier transform of length b
    parameters                   in out / block_size
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

from ..core.adapter import Delta
from ..core.bases import Base
from ..core.config import PeftConfig, Positive
from ..core.targets import pattern_value


@dataclass
class C3AConfig(PeftConfig, method="C3A", layers_need_list=True):
    """Fields of C3A. `block_size` divides the inputs and the outputs of every adapted layer."""

    block_size: Positive = 256  # b
    target_modules: list[str] | str | None = None
    bias: Literal["none", "all", "c3a_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    block_size_pattern: dict[str, Positive] | None = field(default_factory=dict)  # by path or regular expression
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"  # True: zeros


class C3A(Delta, config=C3AConfig):
    prefix = "c3a_"

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        b = pattern_value(config.block_size_pattern, path, config.block_size)
        base.require_divisible(b, "block_size", path)

    def build(self) -> None:
        c = self.config
        b = self.block_size = pattern_value(c.block_size_pattern, self.path, c.block_size)
        n, m = self.base.in_features, self.base.out_features
        k = torch.zeros(m // b, n // b, b, dtype=torch.float32)
        if c.init_weights == "gaussian":
            k.normal_()
        elif c.init_weights is not True:
            a = math.sqrt(1 / n) if c.init_weights == "kaiming_uniform" else math.sqrt(3) * math.sqrt(2 / (n + m))
            k.uniform_(-a, a)
        self.c3a_kernel = nn.Parameter(k)

    def delta(self) -> Tensor:
        k = self.c3a_kernel / self.base.in_features
        i, j, t = (torch.arange(size, device=k.device) for size in k.shape)
        C = k[i[:, None, None, None], j[:, None], (t - t[:, None, None]) % len(t)]  # (out / b, b, in / b, b)
        return C.view(self.base.out_features, self.base.in_features)

    def branch(self, x: Tensor) -> Tensor:
        k = self.c3a_kernel.to(torch.promote_types(self.c3a_kernel.dtype, torch.float32))
        x = x.to(k.dtype).unflatten(-1, (-1, self.block_size))  # (..., in / b, b)
        return Convolution.apply(x, k / self.base.in_features).flatten(-2)  # (..., out)


class Convolution(torch.autograd.Function):
    """C x (..., out / b, b). It keeps x for the gradients: F(x), and what einsum makes of it, are twice as large."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, k: Tensor) -> Tensor:
        y = torch.einsum("...nf,mnf->...mf", rfft(x), rfft(k).conj())  # f = 0 .. b / 2
        return irfft(y, k.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, k = ctx.saved_tensors
        g = rfft(grad)
        x_grad = irfft(torch.einsum("...mf,mnf->...nf", g, rfft(k)), k.shape[-1]) if ctx.needs_input_grad[0] else None
        return x_grad, irfft(torch.einsum("...mf,...nf->mnf", g.conj(), rfft(x)), k.shape[-1])
