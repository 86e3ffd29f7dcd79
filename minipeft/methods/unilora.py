"""Uni-LoRA - one vector for the whole model. Li et al., 2025, https://arxiv.org/abs/2506.00799.

    W' = W + B A        A = theta[i_A] / sqrt(n[i_A])        B = theta[i_B] / sqrt(n[i_B])
    parameters          theta_d_length in all

    theta: (d,), shared by all layers; i_A: (r, in), i_B: (out, r), random indices into it; n: (d,), how often the
    indices of all layers name each entry, so that the projection from theta to all factors keeps lengths
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Factored
from ..core.bases import Base, dropout
from ..core.config import ABOVE_ZERO, PeftConfig, Positive, Probability, Size
from ..maths.draw import balanced_indices

THETA = "unilora_theta_d"


@dataclass
class UniLoraConfig(PeftConfig, method="UNILORA", layers_need_list=True):
    """Fields of Uni-LoRA."""

    r: Positive = 4  # rank
    proj_seed: int = 42  # of the indices
    theta_d_length: Size = 256  # d
    target_modules: list[str] | str | None = None
    unilora_dropout: Probability = 0.0  # on the input of A, while training
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "unilora_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_theta_d_bound: Annotated[float, ABOVE_ZERO] = 0.02  # theta is drawn from [-bound, bound]
    init_weights: bool = True  # False: theta normal
    save_indices: bool = False  # keep the indices and their scales in the checkpoint; otherwise drawn again
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


class UniLoRA(Factored, config=UniLoraConfig):
    prefix = "unilora_"
    shares = True

    @classmethod
    def is_saved(cls, slot: str, config: Any) -> bool:
        return slot.startswith(cls.prefix) and (config.save_indices or slot == THETA)

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        d, bound = config.theta_d_length, config.init_theta_d_bound
        return {THETA: nn.Parameter(torch.empty(d).uniform_(-bound, bound) if config.init_weights else torch.randn(d))}

    def build(self) -> None:
        c = self.config
        self.r = c.r
        self.unilora_dropout = dropout(c.unilora_dropout)

    @classmethod
    def after_build(cls, config: Any, adapters: list[Adapter]) -> None:
        shapes = [s for a in adapters for s in ((config.r, a.base.in_features), (a.base.out_features, config.r))]
        sizes = [math.prod(shape) for shape in shapes]
        indices = balanced_indices(sum(sizes), config.theta_d_length, config.proj_seed)
        scales = torch.bincount(indices, minlength=config.theta_d_length).float().rsqrt()
        for i, part in enumerate(indices.split(sizes)):
            adapter, side, part = adapters[i // 2], "AB"[i % 2], part.view(shapes[i]).clone()
            setattr(adapter, f"unilora_indices_{side}", part.to(adapter.base.device))
            setattr(adapter, f"unilora_scales_{side}", scales[part].to(adapter.base.device, adapter.base.dtype))

    def index_bound(self, slot: str) -> Any:
        return self.config.theta_d_length if slot.startswith("unilora_indices") else None

    def factors(self) -> tuple[Tensor, Tensor]:
        theta = self.unilora_theta_d
        A = theta[self.unilora_indices_A] * self.unilora_scales_A
        return theta[self.unilora_indices_B] * self.unilora_scales_B, A
