"""PEANuT - weight-aware neural tweakers. Zhong et al., 2024, https://arxiv.org/abs/2410.01870.

    W' = W + s (f(W^T A^T) B^T)^T              depth=0; A: (r, out), B: (out, r), B = 0 at the start
    H_0 = f(W^T A^T)                           f: `act_fn`, on every number; H: (in, r)
    H_i = f(H_i-1 E_i^T)                       i = 1 ... depth; E_i, D_i: (r, r)
    H <- f(H D_i^T) + H_depth-i                i = 1 ... depth; then W' = W + s (H B^T)^T
    parameters                                 2 r (out + depth r)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Delta
from ..base import linear
from ..config import PeftConfig, Positive
from ..errors import ConfigError, nearest
from ..tuner import register_tuner


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def xielu(x: Tensor) -> Tensor:
    """xIELU, https://arxiv.org/abs/2411.13010, with its constants as bfloat16 holds them."""
    low = lambda value: torch.tensor([value], dtype=torch.bfloat16, device=x.device)
    beta, up, down = low(0.5), *(F.softplus(low(value).expm1().log()) for value in (0.8, 0.8 - 0.5))
    down = beta + down
    negative = (torch.expm1(torch.min(x, low(-1e-6).to(x))) - x) * down + beta * x
    return torch.where(x > 0, up * x * x + beta * x, negative)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by the names that transformers gives them
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "prelu": lambda x: F.leaky_relu(x, 0.25),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
    "xielu": xielu,
}


@dataclass
class PeanutConfig(PeftConfig, method="PEANUT"):
    """Fields of PEANuT."""

    r: Positive = 32  # width of the network
    depth: int = 0  # pairs of (r, r) layers between A and B
    act_fn: str = "relu"  # a key of ACTIVATIONS
    scaling: float = 1.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True  # False: B random

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 0:
            raise ConfigError(f"`depth` can only be a non-negative integer, got {self.depth}.")
        if self.act_fn not in ACTIVATIONS:
            hint = nearest(self.act_fn, ACTIVATIONS)
            names = ", ".join(ACTIVATIONS)
            raise ConfigError(f"Unsupported `act_fn` {self.act_fn!r}.{hint} It must be one of {names}.")


class PEANuT(Delta, config=PeanutConfig):
    prefix = "peanut_"
    bases = ("Linear", "Conv1D", "Conv", "Embedding")

    def build(self) -> None:
        c, r, out = self.config, self.config.r, self.base.out
        self.r, self.scaling = r, c.scaling
        self.peanut_A = linear(out, r)
        if c.depth:
            self.peanut_encoders = nn.ModuleList(linear(r, r) for _ in range(c.depth))
            self.peanut_decoders = nn.ModuleList(linear(r, r) for _ in range(c.depth))
        self.peanut_B = linear(r, out)
        for layer in (self.peanut_A, *self.layers):  # PEFT: draws them twice
            nn.init.kaiming_uniform_(layer.get_parameter("weight"), a=math.sqrt(5))
        if c.init_weights:
            nn.init.zeros_(self.peanut_B.weight)
        else:
            nn.init.kaiming_uniform_(self.peanut_B.weight, a=math.sqrt(5))

    def initial_scaling(self) -> float:
        return self.config.scaling

    @property
    def layers(self) -> list[nn.Module]:
        """The layers between A and B."""
        return [*self.peanut_encoders, *self.peanut_decoders] if self.config.depth else []

    def delta(self) -> Tensor:
        f, depth = ACTIVATIONS[self.config.act_fn], self.config.depth
        W0, _ = self.base.read()
        H = [f(self.peanut_A(W0.to(self.peanut_A.weight).flatten(1).t()))]  # (in, r)
        for E in self.layers[:depth]:
            H.append(f(E(H[-1])))
        last = H.pop()
        for D in self.layers[depth:]:
            last = f(D(last)) + H.pop()
        return (self.peanut_B(last) * self.scaling).t().reshape(W0.shape)


PeanutModel = register_tuner("PeanutModel", "PEANUT")
