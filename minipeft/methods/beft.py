"""BEFT - Bias-Efficient Fine-Tuning. Huang et al., 2025, https://arxiv.org/abs/2509.15974.

    y = W x + b + d              d: (1, out), 0 at the start
    parameters                   out
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Activation, Parts
from ..core.config import PeftConfig


@dataclass
class BeftConfig(PeftConfig, method="BEFT"):
    """Fields of BEFT. Only a layer that has a bias can be merged."""

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # zeros; otherwise standard normal


class BEFT(Activation, config=BeftConfig):
    prefix = "beft_"
    bases = ("Linear", "Conv1D", "Conv")

    def build(self) -> None:
        d = torch.randn(1, self.base.out_features)
        self.beft_bias = nn.Parameter(torch.zeros_like(d) if self.config.init_weights else d)

    def post(self, y: Tensor) -> Tensor:
        return y + self.beft_bias.flatten()  # (..., out)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:  # not a bit of W is rounded
        return W, self.post(W.new_zeros(W.shape[0]) if b is None else b)

    def in_parts(self, b: Tensor | None) -> Parts:
        return Parts(lambda W, rows: W, self.beft_bias.flatten() if b is None else self.post(b))
