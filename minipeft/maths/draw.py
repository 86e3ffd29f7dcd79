"""Initial values that several methods share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import ConfigError


def uniform(*shape: int, zero: bool = False) -> nn.Parameter:
    """A parameter as torch draws a layer's weight of that shape: uniform, variance 1 / (3 fan_in). `zero`: zeros."""
    value = torch.zeros(shape)
    return nn.Parameter(value if zero else nn.init.kaiming_uniform_(value, a=math.sqrt(5)))


def redraw(*layers: Any, zero: bool) -> None:
    """Draw the weights of linear layers again, as PEFT does. `zero`: the last one's become zeros instead."""
    for layer in layers[:-1]:
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    if zero:
        nn.init.zeros_(layers[-1].weight)
    else:
        nn.init.kaiming_uniform_(layers[-1].weight, a=math.sqrt(5))


def balanced_indices(lora_param_count: int, theta_d_length: int, proj_seed: int) -> Tensor:
    """Random indices (lora_param_count,) into theta, in which no entry occurs more than once more than another."""
    if lora_param_count < 0 or theta_d_length <= 0:
        raise ConfigError(
            "`lora_param_count` must be 0 or more and `theta_d_length` above 0, "
            f"got {lora_param_count} and {theta_d_length}."
        )
    if proj_seed < 0 or lora_param_count > np.iinfo(np.int64).max:
        raise ConfigError(
            f"`proj_seed` must be 0 or more, and `lora_param_count` an index; got {proj_seed} and {lora_param_count}."
        )
    rng = np.random.default_rng(proj_seed)
    times, rest = divmod(lora_param_count, theta_d_length)
    indices = np.repeat(np.arange(theta_d_length), times)
    if rest:
        indices = np.concatenate([indices, rng.choice(theta_d_length, size=rest, replace=False)])
    rng.shuffle(indices)
    return torch.as_tensor(indices, dtype=torch.long)
