"""(IA)^3 - Infused Adapter by Inhibiting and Amplifying Inner Activations.
Liu et al., 2022, https://arxiv.org/abs/2205.05638, section 3.3.

    y = l * (W x + b)            l: (out, 1)
    y = W (l * x) + b            l: (1, in), in feed-forward modules
    parameters                   out, or in with feedforward_modules=target_modules
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Activation
from ..core.config import PeftConfig
from ..core.errors import ConfigError
from ..core.targets import named


@dataclass
class IA3Config(PeftConfig, method="IA3"):
    """Fields of (IA)^3; `feedforward_modules` are the targets that scale their input instead of their output."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None  # must be among target_modules
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True  # ones; otherwise standard normal

    def __post_init__(self):
        super().__post_init__()
        part, whole = self.feedforward_modules, self.target_modules
        if isinstance(part, set) and isinstance(whole, set) and not part <= whole:
            raise ConfigError("`feedforward_modules` should be a subset of `target_modules`")


class IA3(Activation, config=IA3Config):
    prefix = "ia3_"
    bases = ("Linear", "Conv1D", "Conv")

    def build(self) -> None:
        self.is_feedforward = named(self.path, self.config.feedforward_modules)
        n = self.base.in_features if self.is_feedforward else self.base.out_features
        l = torch.randn(self.base.gain_shape(n, self.is_feedforward))
        self.ia3_l = nn.Parameter(torch.ones_like(l) if self.config.init_ia3_weights else l)

    def pre(self, x: Tensor) -> Tensor:
        return x * self.base.input_scale(self.ia3_l) if self.is_feedforward else x  # (..., in)

    def adjoint(self, rows: Tensor) -> Tensor:
        return self.pre(rows)

    def post(self, y: Tensor) -> Tensor:
        return y if self.is_feedforward else y * self.ia3_l.flatten()  # (..., out)
