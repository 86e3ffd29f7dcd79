"""AdaLoRA - Adaptive budget allocation for LoRA. Zhang et al., 2023, https://arxiv.org/abs/2303.10512, eq. 3 and 4.

    W' = W + s B diag(E) A       A: (r, in), B: (out, r), E: (r, 1), E = 0 at the start
                                 s = alpha / r_0, r_0 the rank at the start
    parameters                   init_r (in + out + 1)

A and B^T are held nearly orthogonal by a term of the loss (model.py). While it trains, entries of E that matter
little are set to 0 (budget.py); saved is what is left (pruned.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Delta, Rows
from ...core.bases import dropout
from ...core.config import Fraction, NotNegative, Positive
from ...core.errors import ConfigError, PeftWarning, UnsupportedFeatureError
from ..lora.lora import LoraConfig, LowRank
from .pruned import pruned, take_ranks

NOT_USED = ("use_rslora", "alpha_pattern", "lora_bias")


@dataclass
class AdaLoraConfig(LoraConfig, method="ADALORA", optional=("r",)):
    """Fields of AdaLoRA beside those of LoRA, whose `r` is not used. Steps are calls of `update_and_allocate`."""

    target_r: Positive = 8  # mean rank in the end
    init_r: Positive = 12  # rank of each layer at the start
    tinit: NotNegative = 0  # steps before the first pruning
    tfinal: NotNegative = 0  # steps after the last
    deltaT: Positive = 1  # steps from one pruning to the next
    beta1: Fraction = 0.85  # decay of the moving average of the importance
    beta2: Fraction = 0.85  # and of its uncertainty
    orth_reg_weight: float = 0.5  # c
    total_step: int | None = None  # of the whole training
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]  # E by name -> what is left of it

    def __post_init__(self):
        super().__post_init__()
        if self.use_dora or self.loftq_config:
            raise ConfigError(f"ADALORA does not support {'DoRA' if self.use_dora else 'LoftQ'}.")
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError(f"AdaLoRA needs `total_step`, the number of training steps; got {self.total_step}.")
        if self.tinit >= self.total_step - self.tfinal:
            ends = f"got tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}"
            raise ConfigError(f"There must be steps to prune in between `tinit` and `total_step - tfinal`; {ends}.")
        if self.orth_reg_weight < 0:
            raise ConfigError(f"`orth_reg_weight` must not be negative, got {self.orth_reg_weight}.")
        idle = [name for name in NOT_USED if getattr(self, name)] + ["r"] * (self.r != 8)
        if idle:
            warnings.warn(f"AdaLoRA does not use {idle}: ignored. The rank at the start is `init_r`.", PeftWarning)


class AdaLoRA(Delta, config=AdaLoraConfig):
    prefix = "lora_"
    bases = ("Linear", "Conv1D", "Conv")
    convert_for_save, resize = staticmethod(pruned), staticmethod(take_ranks)

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> Any:
        if config.target_parameters:
            raise UnsupportedFeatureError("AdaLoRA adapts layers: leave `target_parameters` unset.")
        return LowRank.prepare(config, model)

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        same = {name: other for name, other in others.items() if other.peft_type == config.peft_type}
        trained = [name for name, other in same.items() if not other.inference_mode]
        if trained and not config.inference_mode:
            raise ConfigError(
                f"AdaLoRA trains one adapter at a time, and '{trained[0]}' is being trained: "
                "set inference_mode=True for all but one."
            )

    def build(self) -> None:
        c, base = self.config, self.base
        left = (c.rank_pattern or {}).get(f"{self.path}.lora_E")  # of a checkpoint
        self.r = r = c.init_r if left is None else sum(left)
        self.lora_alpha = c.lora_alpha
        self.scaling = self.initial_scaling()
        self.lora_dropout = dropout(c.lora_dropout)
        A, E, B = torch.randn(r, base.fan_in), torch.randn(r, 1), torch.randn(base.out_features, r)
        torch.randn(1)  # PEFT: draws the rank before setting it
        if c.init_lora_weights:
            A, E, B = nn.init.normal_(A, std=0.02), nn.init.zeros_(E), nn.init.normal_(B, std=0.02)
        self.lora_A, self.lora_B, self.lora_E = nn.Parameter(A), nn.Parameter(B), nn.Parameter(E)
        rank = torch.full((1,), float(c.init_r), device=base.device)
        self.ranknum = nn.Parameter(rank, requires_grad=False)

    def initial_scaling(self) -> float:
        return self.lora_alpha if self.lora_alpha > 0 else float(self.config.init_r)

    @property
    def scale(self) -> Tensor:
        return self.scaling / (self.ranknum + 1e-5)  # (1,)

    def delta(self) -> Tensor:
        return self.delta_rows()(slice(None)).view(self.base.shape)  # (out, in)

    def delta_rows(self) -> Rows:
        B, A = self.lora_B, self.scale * self.lora_E * self.lora_A
        return lambda rows: B[rows] @ A

    def branch(self, x: Tensor) -> Tensor:
        x = self.lora_dropout(self.cast(x, self.lora_A))
        if not self.base.pointwise:
            return super().branch(x)
        return F.linear(F.linear(x, self.lora_A * self.lora_E) * self.scale, self.lora_B)  # (..., out)
