"""PEANuT - weight-aware neural tweakers. Zhong et al., 2024, https://arxiv.org/abs/2410.01870.

    W' = W + s (f(W^T A^T) B^T)^T              depth=0; A: (r, out), B: (out, r), B = 0 at the start
    H_0 = f(W^T A^T)                           f: `act_fn`, on every number; H: (in, r)
    H_i = f(H_i-1 E_i^T)                       i = 1 ... depth; E_i, D_i: (r, r)
    H <- f(H D_i^T) + H_depth-i                i = 1 ... depth; then W' = W + s (H B^T)^T
    parameters                                 2 r (out + depth r)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from ..core.adapter import Delta, Rows
from ..core.bases import Base
from ..core.config import Bound, PeftConfig, Size
from ..core.errors import ConfigError, nearest
from ..maths.activations import ACTIVATIONS
from ..maths.draw import redraw

Depth = Annotated[int, Bound("an integer from 0 to 1000", lambda value: 0 <= value <= 1000)]


@dataclass
class PeanutConfig(PeftConfig, method="PEANUT"):
    """Fields of PEANuT."""

    r: Size = 32  # width of the network
    depth: Depth = 0  # pairs of (r, r) layers between A and B
    act_fn: str = "relu"  # a key of activations.ACTIVATIONS
    scaling: float = 1.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True  # False: B random

    def __post_init__(self):
        super().__post_init__()
        if self.act_fn not in ACTIVATIONS:
            hint = nearest(self.act_fn, ACTIVATIONS)
            raise ConfigError(f"Unknown `act_fn` {self.act_fn!r}.{hint} It must be one of {', '.join(ACTIVATIONS)}.")


class PEANuT(Delta, config=PeanutConfig):
    prefix = "peanut_"
    bases = ("Linear", "Conv1D", "Conv", "Embedding")

    def build(self) -> None:
        c, r, out = self.config, self.config.r, self.base.out_features
        self.r, self.scaling = r, c.scaling
        self.peanut_A, self.peanut_B = nn.Linear(out, r, bias=False), nn.Linear(r, out, bias=False)
        if c.depth:
            self.peanut_encoders = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(c.depth))
            self.peanut_decoders = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(c.depth))
        redraw(self.peanut_A, *self.layers, self.peanut_B, zero=c.init_weights)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers between A and B."""
        return [*self.peanut_encoders, *self.peanut_decoders] if self.config.depth else []

    def hidden(self) -> Tensor:
        """What B is applied to, (in, r)."""
        f, depth = ACTIVATIONS[self.config.act_fn], self.config.depth
        W0, _ = self.base.read()
        H = [f(self.peanut_A(W0.to(self.peanut_A.weight).flatten(1).t()))]  # (in, r)
        for E in self.layers[:depth]:
            H.append(f(E(H[-1])))
        last = H.pop()
        for D in self.layers[depth:]:
            last = f(D(last)) + H.pop()
        return last

    def delta(self) -> Tensor:
        dW = Base.matrix(self.peanut_B) @ self.hidden().t()
        return dW.mul_(self.scaling).view(self.base.shape)  # a scaled factor would be kept for the gradients, too

    def delta_rows(self) -> Rows:
        B, H = Base.matrix(self.peanut_B), self.hidden()
        return lambda rows: (B[rows] @ H.t()).mul_(self.scaling)
