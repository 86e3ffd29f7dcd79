"""DEFT - Decompositional Efficient Fine-Tuning. Kumar et al., 2025, https://arxiv.org/abs/2509.22793.

    W' = (I - Q P'^T) W + s Q R          Q, P': (out, r), R: (r, in); R = P'^T W / s at the start, so that W' = W
                                         relu: Q = P, P' = relu(P); qr: Q = P' = the orthonormal columns of P
                                         s = alpha / r, or 1 without alpha
    W' = (I - Q P'^T) W                  para: PaRa, Chen et al., 2024, https://arxiv.org/abs/2406.05641
    parameters                           r (in + out), or r out with para=True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Factored
from ..core.bases import dropout
from ..core.config import PeftConfig, Positive, Probability


@dataclass
class DeftConfig(PeftConfig, method="DEFT", layers_need_list=True, optional=("init_scale",)):
    """Fields of DEFT. With `para`, a new adapter changes the output."""

    r: Positive = 8  # rank, at most out
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0  # of a random R
    alpha: int | None = None  # None: R is not scaled
    para: bool = False  # no R
    fan_in_fan_out: bool = False  # weights stored (in, out); found out by itself
    deft_dropout: Probability = 0.0  # on the input of R, while training
    init_weights: bool = True  # False: R random
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: Literal["none", "all", "deft_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None


class DEFT(Factored, config=DeftConfig):
    prefix = "deft_"

    def build(self) -> None:
        c, base = self.config, self.base
        self.deft_r = min(c.r, base.out_features)
        self.deft_scaling = c.alpha / self.deft_r if c.alpha else 1.0
        self.deft_dropout = dropout(c.deft_dropout)
        self.deft_P = nn.Parameter(nn.init.normal_(torch.empty(base.out_features, self.deft_r), std=0.02))
        if not c.para:
            R = torch.empty(self.deft_r, base.in_features)
            self.deft_R = nn.Parameter(R if c.init_weights else nn.init.normal_(R, std=0.02 * c.init_scale))
            if c.init_weights:
                P = self.deft_P.data.to(self.device)
                self.deft_R.data = self.removed(self.pair(P)[1]) / self.deft_scaling

    def pair(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, P'), each (out, r), in at least float32: a QR decomposition needs that."""
        P = P.to(torch.promote_types(P.dtype, torch.float32))
        if self.config.decomposition_method == "relu":
            return P, F.relu(P)
        Q = torch.linalg.qr(P)[0]
        return Q, Q

    def removed(self, P: Tensor) -> Tensor:
        """P'^T W of the frozen weight, (r, in)."""
        return P.t() @ self.base.read()[0].to(P)

    def factors(self) -> tuple[Tensor, Tensor]:
        Q, P = self.pair(self.deft_P)
        M = -self.removed(P)
        return Q, M if self.config.para else M + self.deft_scaling * self.deft_R  # (out, r), (r, in)

    def branch(self, x: Tensor) -> Tensor:
        Q, P = self.pair(self.deft_P)
        x = self.cast(x, Q)
        h = -F.linear(x, self.removed(P))  # (..., r)
        if not self.config.para:
            h = h + F.linear(self.deft_dropout(x), (self.deft_scaling * self.deft_R).to(Q))
        return F.linear(h, Q)  # (..., out)
