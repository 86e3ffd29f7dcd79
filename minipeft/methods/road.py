"""RoAd - 2D Rotary Adaptation. Liao and Monz, 2024, https://arxiv.org/abs/2409.00119, eq. 3 and 4.

    y = R (W x + b)              R turns and stretches pairs of outputs:

    |y_j|   |a_j cos t_j   -a_j sin t_j|  |h_j|      h = W x + b; j and k lie group_size / 2 apart in one group
    |y_k| = |a_k sin t_k    a_k cos t_k|  |h_k|

    t, a: (out / 2,) road_1, a_j = a_k; (out,) road_2; (2 out,) road_4: one for the cosines and one for the sines
    parameters                   out, or 2 out with variant=road_2, or 4 out with variant=road_4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Activation
from ..core.bases import Base
from ..core.config import Bound, PeftConfig

Even = Annotated[int, Bound("an even number above 0", lambda n: n > 0 and n % 2 == 0)]


@dataclass
class RoadConfig(PeftConfig, method="ROAD", optional=("init_weights",)):
    """Fields of RoAd. `group_size` is even and divides the number of outputs of every adapted layer."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Even = 64  # outputs are paired within groups of this size
    init_weights: bool = True  # R = I; otherwise t normal with std 0.5, and a too, around 1
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None


class RoAd(Activation, config=RoadConfig):
    prefix = "road_"
    bases = ("Linear", "Conv1D", "Conv")

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        base.require_divisible(config.group_size, "group_size", path, sides="out_features")

    def build(self) -> None:
        c = self.config
        self.variant, self.group_size = c.variant, c.group_size
        n = self.base.out_features
        size = {"road_1": n // 2, "road_2": n, "road_4": 2 * n}[c.variant]
        std = 0.0 if c.init_weights else 0.5
        t, a = torch.zeros(size), torch.ones(size)
        if std:
            t, a = t.normal_(0.0, std), a.normal_(1.0, std)
        self.road_theta, self.road_alpha = nn.Parameter(t), nn.Parameter(a)

    def parts(self) -> tuple[Tensor, Tensor]:
        """a cos t and a sin t, each (groups, 2, group_size / 2)."""
        rows = {"road_1": 1, "road_2": 2, "road_4": 4}[self.variant]
        t, a = (v.view(-1, rows, self.group_size // 2) for v in (self.road_theta, self.road_alpha))
        cos, sin = a * t.cos(), a * t.sin()
        return (cos[:, :2], sin[:, 2:]) if rows == 4 else (cos.expand(-1, 2, -1), sin.expand(-1, 2, -1))

    def post(self, y: Tensor) -> Tensor:
        cos, sin = self.parts()
        h = self.cast(y, cos).unflatten(-1, (-1, 2, self.group_size // 2))
        swapped = (h * torch.stack([sin[:, -1], -sin[:, 0]], -2)).flip(-2)  # (-h_k sin_j, h_j sin_k)
        return (h * cos).add_(swapped).flatten(-3)  # (..., out)
