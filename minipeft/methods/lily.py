"""Lily - Low-rank Interconnected adaptation across Layers. Zhong et al., 2024, https://arxiv.org/abs/2407.09946.

    y = W x + s sum_e p_e B_e A x         A: (r, in), shared by `stride_A` layers after each other; B_e: (out, r)
    p = mean softmax(G A x)               G: (num_B, r), a layer's own; the mean over all vectors of the batch
    The B_e are shared by all layers that one entry of `target_modules` names and that have one shape.
    parameters                            r in + num_B r, and num_B r out in all
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Routed
from ..core.config import Bound, PeftConfig, Positive
from ..maths.draw import redraw

Several = Annotated[int, Bound("at least 2, to choose from", lambda n: n >= 2)]


@dataclass
class LilyConfig(PeftConfig, method="LILY"):
    """Fields of Lily."""

    r: Positive = 32  # rank
    stride_A: Positive = 1  # number of layers that share an A
    num_B: Several = 2  # number of B_e
    scaling: float = 1.0  # s
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True  # False: B random


class Lily(Routed, config=LilyConfig):
    prefix = "lily_"

    def build(self) -> None:
        c = self.config
        self.r, self.scaling, self.stride_A, self.num_B = c.r, c.scaling, c.stride_A, c.num_B
        self.lily_A = nn.Linear(self.base.in_features, c.r, bias=False)
        self.lily_B = nn.Linear(self.base.out_features, c.num_B * c.r, bias=False)  # the B_e^T below each other
        self.lily_router = nn.Linear(c.r, c.num_B, bias=False)
        redraw(self.lily_A, self.lily_router, self.lily_B, zero=c.init_weights)

    @classmethod
    def after_build(cls, config: Any, adapters: list[Adapter]) -> None:
        groups: dict[Any, list[Any]] = {}  # PEFT: adapters added to a model later share nothing
        names = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
        for adapter in adapters:
            ends = (name for name in names if adapter.path.endswith(name))
            named = max(ends, key=len, default=str(config.target_modules))
            groups.setdefault((named, adapter.base.shape), []).append(adapter)
        for group in groups.values():
            for i, adapter in enumerate(group):
                adapter.lily_A = group[i - i % config.stride_A].lily_A
                adapter.lily_B = group[0].lily_B

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)
        h = self.lily_A(self.cast(x, self.lily_A.weight))  # (..., r)
        p = torch.softmax(self.lily_router(h), -1).flatten(0, -2).mean(0)  # (num_B,)
        B = torch.einsum("e,ero->ro", self.scaling * p, self.lily_B.weight.unflatten(0, (len(p), -1)))  # (r, out)
        return y + (h @ B).to(y.dtype)
