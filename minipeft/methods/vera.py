"""VeRA - Vector-based Random Matrix Adaptation. Kopiczko et al., 2023, https://arxiv.org/abs/2310.11454, eq. 2.

    W' = W + diag(l_b) B diag(l_d) A        A: (r, in), B: (out, r), random, frozen and shared by all layers
                                            l_d: (r,), l_b: (out,), l_b = 0 at the start
    parameters                              r + out

The shared matrices have the sizes of the largest layer; a smaller one uses their first columns and rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Factored
from ..core.bases import dropout
from ..core.config import Probability
from .projections import Projected, ProjectedConfig


@dataclass
class VeraConfig(ProjectedConfig, method="VERA"):
    """Fields of VeRA. All adapters of a model have the same `projection_prng_key` and `save_projection`."""

    vera_dropout: Probability = 0.0  # on the input of A, while training
    d_initial: float = 0.1  # l_d at the start
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # False: l_b = 1, l_d normal
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


class VeRA(Projected, Factored, config=VeraConfig):
    prefix = "vera_lambda_"
    pair = ("vera_A", "vera_B")

    @classmethod
    def shapes(cls, config: Any, inp: int, out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (config.r, inp), (out, config.r)

    def build(self) -> None:
        c = self.config
        self.r = c.r
        self.vera_dropout = dropout(c.vera_dropout)
        l_b, l_d = torch.ones(self.base.out_features), torch.randn(c.r)
        self.vera_lambda_b = nn.Parameter(torch.zeros_like(l_b) if c.init_weights else l_b)
        self.vera_lambda_d = nn.Parameter(torch.full_like(l_d, c.d_initial) if c.init_weights else l_d)

    @property
    def projections(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer."""
        l = self.vera_lambda_b
        return self.vera_A[:, : self.base.in_features].to(l), self.vera_B[: self.base.out_features].to(l)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.projections
        return self.vera_lambda_b[:, None] * B, self.vera_lambda_d[:, None] * A  # (out, r), (r, in)

    def branch(self, x: Tensor) -> Tensor:
        A, B = self.projections
        x = self.vera_dropout(self.cast(x, A))
        return self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(x, A), B)  # (..., out)
