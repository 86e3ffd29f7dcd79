"""GraLoRA - Granular Low-Rank Adaptation. Jung et al., 2025, https://arxiv.org/abs/2505.20355.

    W'_ji = W_ji + s B_ji A_ji           W_ji: the (out / k, in / k) blocks of W, i, j < k
                                         A_ji: (r / k, in / k), B_ji: (out / k, r / k), B = 0 at the start
                                         s = alpha / (r + hybrid_r)
    W' = W + s (GraLoRA + B' A')         A': (hybrid_r, in), B': (out, hybrid_r), with hybrid_r > 0
    parameters                           (r + hybrid_r) (in + out)

Stored: A (k, in / k, r), where A[i] holds A_0i^T, ..., A_(k-1)i^T side by side; B (k, r, out / k), where B[j] holds
B_j0^T, ..., B_j(k-1)^T one below the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Delta, Rows
from ..core.bases import Base, dropout
from ..core.config import NotNegative, PeftConfig, Positive, Probability
from ..core.errors import ConfigError
from ..maths.draw import uniform


@dataclass
class GraloraConfig(PeftConfig, method="GRALORA"):
    """Fields of GraLoRA."""

    r: Positive = 32  # rank of a row of blocks; gralora_k must divide it
    hybrid_r: NotNegative = 0  # rank of a plain LoRA beside the blocks
    target_modules: list[str] | str | None = None
    alpha: int | float = 64
    gralora_dropout: Probability = 0.0  # on the input of A, while training
    gralora_k: Positive = 2  # number of blocks along each side
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "gralora_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # False: B random
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ConfigError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}.")


class GraLoRA(Delta, config=GraloraConfig):
    prefix = "gralora_"

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        base.require_divisible(config.gralora_k, "gralora_k", path)

    def build(self) -> None:
        c, inp, out, k = self.config, self.base.in_features, self.base.out_features, self.config.gralora_k
        self.r, self.hybrid_r, self.alpha, self.gralora_k = c.r, c.hybrid_r, c.alpha, k
        self.scaling = self.initial_scaling()
        self.gralora_dropout = dropout(c.gralora_dropout)
        pairs = [(uniform(c.r, inp // k).data, uniform(out // k, c.r, zero=c.init_weights).data) for _ in range(k)]
        A, B = (torch.stack(blocks).mT.contiguous() for blocks in zip(*pairs))
        self.gralora_A = nn.Parameter(A)  # (k, in / k, r)
        self.gralora_B = nn.Parameter(B)  # (k, r, out / k)
        self.gralora_A_general = self.base.down(c.hybrid_r) if c.hybrid_r else nn.Identity()
        self.gralora_B_general = self.base.up(c.hybrid_r) if c.hybrid_r else nn.Identity()
        if c.hybrid_r:
            self.gralora_A_general.weight = uniform(c.hybrid_r, inp)
            self.gralora_B_general.weight = uniform(out, c.hybrid_r, zero=c.init_weights)

    def initial_scaling(self) -> float:
        return self.alpha / (self.r + self.hybrid_r)

    @property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """A (i, in / k, j, r / k) and B (j, i, r / k, out / k)."""
        k = self.gralora_k
        return self.gralora_A.unflatten(2, (k, -1)), self.gralora_B.unflatten(1, (k, -1))

    def delta(self) -> Tensor:
        A, B = self.blocks
        dW = torch.einsum("ipjr,jirq->jqip", A, B).reshape(self.base.shape)  # (out, in)
        if self.hybrid_r:
            dW = dW + self.base.low_rank_delta(self.gralora_A_general, self.gralora_B_general)
        return self.scaling * dW

    def delta_rows(self) -> Rows:
        A, B = self.blocks
        up = torch.block_diag(*B.mT.transpose(1, 2).flatten(2))  # (out, k r)
        down = torch.cat([torch.block_diag(*part.mT) for part in A.unbind(2)])  # (k r, in)
        if self.hybrid_r:
            general = self.base.matrix(self.gralora_B_general), self.base.matrix(self.gralora_A_general)
            up, down = torch.cat([up, general[0]], 1), torch.cat([down, general[1]])
        return lambda rows: self.scaling * (up[rows] @ down)

    def branch(self, x: Tensor) -> Tensor:
        A, B = self.blocks
        x = self.cast(x, A)
        h = torch.einsum("...ip,ipjr->...jir", self.gralora_dropout(x).unflatten(-1, (len(A), -1)), A)
        y = torch.einsum("...jir,jirq->...jq", h, B).flatten(-2)  # (..., out)
        if self.hybrid_r:
            y = y + self.base.low_rank_forward(self.gralora_dropout(x), self.gralora_A_general, self.gralora_B_general)
        return self.scaling * y
