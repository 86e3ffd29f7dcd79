"""Activation functions by the names that transformers gives them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def xielu(x: Tensor) -> Tensor:
    """xIELU, https://arxiv.org/abs/2411.13010, with its constants as bfloat16 holds them."""
    low = lambda value: torch.tensor([value], dtype=torch.bfloat16, device=x.device)
    beta, up, down = low(0.5), *(F.softplus(low(value).expm1().log()) for value in (0.8, 0.8 - 0.5))
    down = beta + down
    negative = (torch.expm1(torch.min(x, low(-1e-6).to(x))) - x) * down + beta * x
    return torch.where(x > 0, up * x * x + beta * x, negative)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "prelu": lambda x: F.leaky_relu(x, 0.25),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
    "xielu": xielu,
}
