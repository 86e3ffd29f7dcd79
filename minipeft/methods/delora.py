"""DeLoRA - Decoupled Low-Rank Adaptation. Bini et al., 2025, https://arxiv.org/abs/2503.18225.

    W' = W + (lambda / r) B diag(1 / |a_i| |b_i|) A diag(w)        A: (r, in), rows a_i; B: (out, r), columns b_i
                                                                   lambda: (1,), w: (in,), B = 0 at the start
    parameters                                                     r (in + out) + 1

w are the norms of the frozen weight's columns when the adapter was made; they are saved and not trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Factored
from ..core.bases import dropout
from ..core.config import PeftConfig, Positive, Probability
from ..core.targets import pattern_value
from ..maths.draw import uniform


@dataclass
class DeloraConfig(PeftConfig, method="DELORA", layers_need_list=True):
    """Fields of DeLoRA."""

    r: Positive = 8  # rank
    delora_lambda: int | float = 15  # lambda at the start: bounds the norm of the change
    module_dropout: Probability = 0.0  # on the input of A, while training
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: Literal["none", "all", "delora_only"] = "none"  # which of the model's own biases are trained
    init_weights: bool = True  # False: B random
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Positive] | None = field(default_factory=dict)  # path or regular expression -> r
    lambda_pattern: dict[str, int | float] | None = field(default_factory=dict)
    modules_to_save: list[str] | None = None


class DeLoRA(Factored, config=DeloraConfig):
    prefix = "delora_"

    def build(self) -> None:
        c = self.config
        self.r = pattern_value(c.rank_pattern, self.path, c.r)
        start = pattern_value(c.lambda_pattern, self.path, c.delora_lambda)
        self.delora_dropout = dropout(c.module_dropout)
        self.delora_A = uniform(self.r, self.base.in_features)
        self.delora_B = uniform(self.base.out_features, self.r, zero=c.init_weights)
        self.delora_lambda = nn.Parameter(torch.full((1,), float(start)))
        self.delora_w_norm = self.base.read()[0].detach().norm(dim=0)

    @property
    def scale(self) -> Tensor:
        """What stands between B and A: lambda / (r |a_i| |b_i|), (r,)."""
        lengths = self.delora_A.norm(dim=1).clamp(min=1e-4) * self.delora_B.norm(dim=0).clamp(min=1e-4)
        return self.delora_lambda / (self.r * lengths)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.delora_B * self.scale, self.delora_A * self.delora_w_norm
