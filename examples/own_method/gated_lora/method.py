"""Gated LoRA: LoRA with a learned gate on each output.

    W' = W + diag(g) s B A       A: (r, in), B: (out, r), g: (out,); B = 0 and g = 1 at the start; s = alpha / r
    parameters                   r (in + out) + out
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.core.adapter import Delta
from minipeft.core.config import PeftConfig, Positive


@dataclass
class GatedLoraConfig(PeftConfig, method="GATED_LORA"):
    """Fields of gated LoRA."""

    r: Positive = 8  # rank
    alpha: float = 16.0  # s = alpha / r
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None


class GatedLora(Delta, config=GatedLoraConfig):
    """A and B are modules of the frozen layer's own kind, the gate is a plain parameter."""

    prefix = "gated_"

    def build(self) -> None:
        self.gated_A, self.gated_B = self.base.factors(self.config.r)
        self.base.reset_factors(self.gated_A, self.gated_B)
        self.gated_gate = nn.Parameter(torch.ones(self.base.out_features))
        self.scaling = self.initial_scaling()

    def initial_scaling(self) -> float:
        return self.config.alpha / self.config.r

    def delta(self) -> Tensor:
        BA = self.base.low_rank_delta(self.gated_A, self.gated_B, self.scaling)  # (out, in)
        return self.gated_gate[:, None] * BA

    def branch(self, x: Tensor) -> Tensor:
        h = self.gated_A(self.cast(x, self.gated_A.weight))  # (..., r)
        return self.scaling * self.gated_gate * self.gated_B(h)  # (..., out)
