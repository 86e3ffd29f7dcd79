"""LN tuning - training the normalisation layers in full. Zhao et al., 2023, https://arxiv.org/abs/2312.11420.

    y = LN'(x)                   LN': a trained copy of the layer; any module can be a target
    parameters                   2 dim
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from ..core.adapter import Replacement
from ..core.config import PeftConfig
from ..core.offload import real_copy


@dataclass
class LNTuningConfig(PeftConfig, method="LN_TUNING"):
    """Fields of LN tuning."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | str | None = None


class LNTuning(Replacement, config=LNTuningConfig):
    prefix = "ln_tuning_"

    def build(self) -> None:
        layer = real_copy(self.base.leaf)
        if self.base.changed:  # another adapter is merged into it
            with torch.no_grad():
                for name, tensor in self.base.read()[0].items():
                    attrgetter(name)(layer).copy_(tensor)
        self.ln_tuning_layers = layer

    @property
    def replacement(self) -> nn.Module:
        return self.ln_tuning_layers
