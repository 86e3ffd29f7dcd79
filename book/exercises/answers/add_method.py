"""`pre` is linear and `post` affine: that is all that an Activation has to be, and the merged weight follows."""

from dataclasses import dataclass

import torch
from torch import nn

from minipeft.core.adapter import Activation
from minipeft.core.config import PeftConfig


@dataclass
class GainShiftConfig(PeftConfig, method="GAIN_SHIFT_ANSWER"):
    """Fields of the method."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None


class GainShift(Activation, config=GainShiftConfig):
    prefix = "gainshift_"

    def build(self):
        self.gainshift_g = nn.Parameter(torch.ones(self.base.in_features))
        self.gainshift_s = nn.Parameter(torch.zeros(self.base.out_features))

    def pre(self, x):
        return x * self.gainshift_g  # (..., in)

    def post(self, y):
        return y + self.gainshift_s  # (..., out)
