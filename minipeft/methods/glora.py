"""GLoRA - Generalized LoRA. Chavan et al., 2023, https://arxiv.org/abs/2306.07967.

    W' = W + W0 * A + B                A, B: (out, in)
    b' = b + b0 * D + E + W0 C         C: (in, 1), D, E: (out,); where the layer has a bias
                                       W0, b0: the frozen layer's own, also when other adapters are active
    parameters                         2 r (in + out) + r (in + 1) + 2

Each of the five is a product (m, r) (r, n), a vector, a number or zero, as the configuration says; zero at the start.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Delta, Parts
from ..core.config import PeftConfig, Positive
from ..maths.draw import uniform


@dataclass
class GloraConfig(PeftConfig, method="GLORA"):
    """Fields of GLoRA."""

    r: Positive = 8  # rank of what is a product
    target_modules: list[str] | str | None = None
    bias: Literal["none", "all", "glora_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True  # False: nothing starts at zero


class Path(nn.Module):
    """One of A to E, of the given shape: `path()` is a tensor that broadcasts to it."""

    zeros: Tensor

    def __init__(self, kind: str, shape: tuple[int, ...], r: int, zero: bool):
        super().__init__()
        self.kind = kind
        if kind == "lora":
            up = uniform(r, shape[1])
            self.Xd, self.Xu = uniform(shape[0], r, zero=zero), up
        elif kind == "vector":  # over the outputs of a matrix
            self.X = uniform(1, shape[0], zero=zero) if len(shape) == 1 else uniform(shape[0], 1, zero=zero)
            self.X.data = self.X.data.view(shape[0], *[1] * (len(shape) - 1))
        elif kind == "constant":
            self.X = nn.Parameter(torch.zeros(1) if zero else torch.empty(1).normal_(std=0.02))
        else:
            self.register_buffer("zeros", torch.zeros(shape))  # PEFT: in the checkpoint, too

    def forward(self) -> Tensor:
        return self.Xd @ self.Xu if self.kind == "lora" else self.X if hasattr(self, "X") else self.zeros

    def rows(self, rows: slice) -> Tensor:
        """Some rows of it, where it is a matrix."""
        if self.kind == "lora":
            return self.Xd[rows] @ self.Xu
        return self() if self.kind == "constant" else self()[rows]


class GLoRA(Delta, config=GloraConfig):
    prefix = "glora_"
    by_weight = True

    def build(self) -> None:
        c, out, inp = self.config, self.base.out_features, self.base.in_features
        self.r = c.r
        C, D_E = (c.config_C, c.config_D_E) if self.base.stored()[1] is not None else ("none", "none")
        kinds = {"A": c.config_A_B, "B": c.config_A_B, "C": C, "D": D_E, "E": D_E}
        shapes = {"A": (out, inp), "B": (out, inp), "C": (inp, 1), "D": (out,), "E": (out,)}
        for name, shape in shapes.items():
            setattr(self, f"glora_{name}", Path(kinds[name], shape, c.r, c.init_weights))

    def change(self) -> tuple[Tensor, Tensor | None]:
        """What is added to the weight, and to the bias."""
        parts = [getattr(self, f"glora_{name}")() for name in "ABCDE"]
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        A, B, C, D, E = (part.to(dtype) for part in parts)
        W0, b0 = self.base.read()
        W0, b0 = W0.to(dtype), None if b0 is None else b0.to(dtype)
        return W0 * A + B, shift(W0, b0, C, D, E)

    def branch(self, x: Tensor) -> Tensor:
        dW, db = self.change()
        return self.base.apply(self.cast(x, dW), dW, db)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dW, db = self.change()
        return W + dW, shifted(b, db)

    def in_parts(self, b: Tensor | None) -> Parts:
        (W0, b0), (A, B, C, D, E) = self.base.read(), (getattr(self, f"glora_{name}") for name in "ABCDE")
        db = None if b0 is None else shift(W0.to(C().dtype), b0, C(), D(), E())
        return Parts(lambda W, rows: W + (W0[rows] * A.rows(rows) + B.rows(rows)), shifted(b, db))


def shift(W0: Tensor, b0: Tensor | None, C: Tensor, D: Tensor, E: Tensor) -> Tensor | None:
    """What is added to the bias (out,): b0 D + E + W0 C; None without one."""
    return None if b0 is None else b0 * D + E + (W0 @ C).squeeze(-1)


def shifted(b: Tensor | None, db: Tensor | None) -> Tensor | None:
    return b if db is None else db if b is None else b + db
