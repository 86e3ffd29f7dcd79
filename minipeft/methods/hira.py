"""HiRA - Hadamard High-Rank Adaptation. Huang et al., 2025, https://openreview.net/forum?id=TwJrTz9cRS.

    W' = W + W0 * (B A)          A: (r, width), B: (out, r), B = 0 at the start, elementwise product;
                                 on an embedding A = 0 at the start
                                 W0: the frozen layer's own weight, also when other adapters are active
    parameters                   r (in + out)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Delta, Rows
from ..core.bases import dropout
from ..core.config import PeftConfig, Positive, Probability
from ..core.targets import pattern_value


@dataclass
class HiraConfig(PeftConfig, method="HIRA", layers_need_list=True):
    """Fields of HiRA."""

    r: Positive = 32  # rank of B A
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    hira_dropout: Probability = 0.0  # on the input of the adapter, while training
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_weights: bool | Literal["gaussian"] | None = True  # "gaussian": A normal, std 1 / r; False: B random, too
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Positive] | None = field(default_factory=dict)  # path or regular expression -> r


class HiRA(Delta, config=HiraConfig):
    prefix = "hira_"
    embedding_slots = {"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"}
    bases = ("Linear", "Conv1D", "Conv", "Embedding")

    def build(self) -> None:
        c, (out, *width) = self.config, self.base.shape
        self.r = pattern_value(c.rank_pattern, self.path, c.r)  # PEFT: ignored for the first adapter of a layer
        self.hira_dropout = dropout(c.hira_dropout)
        self.hira_A = nn.Parameter(torch.randn(self.r, *width))  # (r, in) or (r, in / groups, *kernel)
        self.hira_B = nn.Parameter(torch.randn(out, self.r, *[1] * (len(width) - 1)))  # (out, r) or (out, r, 1, ...)
        A, B, init = self.hira_A, self.hira_B, c.init_weights
        if not self.base.reads_vectors:  # PEFT: on an embedding A is zero and B normal, also for "gaussian" and None
            if init is not False:
                nn.init.zeros_(A)
                nn.init.normal_(B)
        elif init:
            if init == "gaussian" and self.base.pointwise:  # PEFT: not on convolutions
                nn.init.normal_(A, std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)

    def delta(self) -> Tensor:
        A, B = self.hira_A, self.hira_B
        W0, _ = self.base.read()
        return W0.to(A) * (B.flatten(1) @ A.flatten(1)).view(W0.shape)

    def delta_rows(self) -> Rows:
        A, B, W0 = self.hira_A, self.hira_B, self.base.read()[0]
        return lambda rows: W0[rows].to(A) * (B[rows] @ A)

    @property
    def by_weight(self) -> bool:
        return not (self.layer.training and isinstance(self.hira_dropout, nn.Dropout))

    def branch(self, x: Tensor) -> Tensor:
        dW = self.delta()
        x = self.hira_dropout(self.cast(x, dW)) if self.base.reads_vectors else x
        return self.base.apply(x, dW)  # PEFT: a padding token of an embedding trains, too
