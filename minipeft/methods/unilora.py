"""Uni-LoRA - one vector for the whole model. Li et al., 2025, https://arxiv.org/abs/2506.00799, eq. 3.

    W' = W + B A        A = theta[i_A] / sqrt(n[i_A])        B = theta[i_B] / sqrt(n[i_B])
    parameters          theta_d_length in all

    theta: (d,), shared by all layers; i_A: (r, in), i_B: (out, r), random indices into it; n: (d,), how often the
    indices of all layers name each entry, so that the projection from theta to all factors keeps lengths
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, Delta
from ..base import Base
from ..config import PeftConfig, Probability
from ..errors import ConfigError
from ..tuner import BaseTuner

THETA = "unilora_theta_d"


@dataclass
class UniLoraConfig(PeftConfig, method="UNILORA"):
    """Fields of Uni-LoRA."""

    r: int = 4  # rank
    proj_seed: int = 42  # of the indices
    theta_d_length: int = 256  # d
    target_modules: list[str] | str | None = None
    unilora_dropout: Probability = 0.0  # on the input of A, while training
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "unilora_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_theta_d_bound: float = 0.02  # theta is drawn from [-bound, bound]
    init_weights: bool = True  # False: theta normal
    save_indices: bool = False  # keep the indices and their scales in the checkpoint; otherwise drawn again
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        for field in ("r", "theta_d_length", "init_theta_d_bound"):
            self.require_positive(field)
        for field in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, field) is not None:
                raise ConfigError(f"`{field}` cannot be used when `target_modules` is a str.")


class UniLoRA(Delta, config=UniLoraConfig):
    prefix = "unilora_"
    shares = True

    @classmethod
    def keeps(cls, slot: str, config: Any) -> bool:
        return slot == THETA or (config.save_indices and slot.startswith(("unilora_indices", "unilora_scales")))

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        d, bound = config.theta_d_length, config.init_theta_d_bound
        return {THETA: nn.Parameter(torch.empty(d).uniform_(-bound, bound) if config.init_weights else torch.randn(d))}

    def build(self) -> None:
        c = self.config
        self.r = c.r
        self.unilora_dropout = nn.Dropout(c.unilora_dropout) if c.unilora_dropout else nn.Identity()

    @classmethod
    def complete(cls, config: Any, adapters: list[Adapter]) -> None:
        factors = [
            (adapter, side, shape)
            for adapter in adapters
            for side, shape in (("A", (config.r, adapter.base.inp)), ("B", (adapter.base.out, config.r)))
        ]
        indices = UniLoraModel.generate_index(
            sum(m * n for _, _, (m, n) in factors), config.theta_d_length, config.proj_seed
        )
        scales = torch.bincount(indices, minlength=config.theta_d_length).float().rsqrt()
        for (adapter, side, shape), part in zip(factors, indices.split([m * n for _, _, (m, n) in factors])):
            part, base = part.view(shape).clone(), adapter.base
            setattr(adapter, f"unilora_indices_{side}", part.to(base.device))
            setattr(adapter, f"unilora_scales_{side}", scales[part].to(base.device, base.dtype))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in)."""
        theta = self.unilora_theta_d
        A = theta[self.unilora_indices_A] * self.unilora_scales_A
        return theta[self.unilora_indices_B] * self.unilora_scales_B, A

    def delta(self) -> Tensor:
        B, A = self.factors
        return B @ A  # (out, in)

    def branch(self, x: Tensor) -> Tensor:
        B, A = self.factors
        return F.linear(F.linear(self.unilora_dropout(self.cast(x, A)), A), B)  # (..., out)


class UniLoraModel(BaseTuner, method="UNILORA"):
    """A model with Uni-LoRA adapters."""

    @staticmethod
    def generate_index(lora_param_count: int, theta_d_length: int, proj_seed: int) -> Tensor:
        """Random indices (lora_param_count,) into theta, in which no entry occurs more than once more than another."""
        if lora_param_count < 0 or theta_d_length <= 0:
            raise ConfigError(
                "`lora_param_count` must be 0 or more and `theta_d_length` above 0, "
                f"got {lora_param_count} and {theta_d_length}."
            )
        rng = np.random.default_rng(proj_seed)
        times, rest = divmod(lora_param_count, theta_d_length)
        indices = np.repeat(np.arange(theta_d_length), times)
        if rest:
            indices = np.concatenate([indices, rng.choice(theta_d_length, size=rest, replace=False)])
        rng.shuffle(indices)
        return torch.as_tensor(indices, dtype=torch.long)
