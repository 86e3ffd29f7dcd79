"""Initial values that several methods share."""

from __future__ import annotations

import math

import torch
from torch import nn


def uniform(*shape: int, zero: bool = False) -> nn.Parameter:
    """A parameter as torch draws a layer's weight of that shape: uniform, variance 1 / (3 fan_in). `zero`: zeros."""
    value = torch.zeros(shape)
    return nn.Parameter(value if zero else nn.init.kaiming_uniform_(value, a=math.sqrt(5)))
