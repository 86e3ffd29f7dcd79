"""Initial values that several methods share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .base import kaiming


def uniform(*shape: int, zero: bool = False) -> nn.Parameter:
    """A parameter as torch draws a layer's weight of that shape: uniform, variance 1 / (3 fan_in). `zero`: zeros."""
    value = torch.zeros(shape)
    return nn.Parameter(value if zero else nn.init.kaiming_uniform_(value, a=math.sqrt(5)))


def redraw(*layers: Any, zero: bool) -> None:
    """Draw the weights of linear layers again, as PEFT does. `zero`: the last one's become zeros instead."""
    for layer in layers[:-1]:
        kaiming(layer.weight.data)
    if zero:
        layers[-1].weight.data.zero_()
    else:
        kaiming(layers[-1].weight.data)
