"""HRA - Householder Reflection Adaptation. Yuan et al., 2024, https://arxiv.org/abs/2405.17484, section 3.1.

    W' = W H_1 ... H_r           H_i = I - 2 u_i u_i^T / |u_i|^2,  u_i: column i of U: (in, r)
                                 u_1 = u_2, u_3 = u_4, ... at the start, so that W' = W
    W' = W (I - 2 V V^T)         apply_GS: V is U with orthonormal columns, by Gram-Schmidt
    parameters                   r in
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Activation
from ..core.config import PeftConfig, Positive
from ..core.errors import PeftWarning
from ..maths.rotations import orthonormal


@dataclass
class HRAConfig(PeftConfig, method="HRA", layers_need_list=True):
    """Fields of HRA. With an even `r` a new adapter changes nothing, unless `apply_GS` is set."""

    r: Positive = 8  # number of reflections
    apply_GS: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True  # columns in equal pairs, if r is even; otherwise all different
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: Literal["none", "all", "hra_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.init_weights and self.r % 2:
            warnings.warn(f"With an odd r, here {self.r}, a new HRA adapter changes the model: no pairs.", PeftWarning)
        elif self.init_weights and self.apply_GS:
            warnings.warn("Gram-Schmidt of equal columns is only rounding noise; set init_weights=False.", PeftWarning)


class HRA(Activation, config=HRAConfig):
    prefix = "hra_"
    bases = ("Linear", "Conv1D", "Conv")
    mixes = True

    def build(self) -> None:
        c = self.config
        self.hra_r, self.hra_apply_GS = c.r, c.apply_GS
        paired = c.init_weights and c.r % 2 == 0
        U = torch.empty(self.base.patch_size, c.r // 2 if paired else c.r)
        nn.init.kaiming_uniform_(U, a=math.sqrt(5))
        self.hra_u = nn.Parameter(U.repeat_interleave(2, 1) if paired else U)

    def pre(self, x: Tensor) -> Tensor:
        return self.reflected(x, reversed)

    def adjoint(self, rows: Tensor) -> Tensor:
        return self.reflected(rows, iter)

    def reflected(self, x: Tensor, order: Any) -> Tensor:
        """x (..., in) at all the hyperplanes, in that order."""
        x = self.cast(x, self.hra_u)
        if self.hra_apply_GS:  # they are orthogonal to each other: in any order
            V = orthonormal(self.hra_u)
            return x - 2 * (x @ V) @ V.T
        for u in order((self.hra_u / self.hra_u.norm(dim=0)).unbind(1)):
            x = x - 2 * (x @ u)[..., None] * u
        return x
