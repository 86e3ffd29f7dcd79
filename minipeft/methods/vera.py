"""VeRA - Vector-based Random Matrix Adaptation. Kopiczko et al., 2023, https://arxiv.org/abs/2310.11454, eq. 2.

    W' = W + diag(l_b) B diag(l_d) A        A: (r, in), B: (out, r), random, frozen and shared by all layers
                                            l_d: (r,), l_b: (out,), l_b = 0 at the start

The shared matrices have the sizes of the largest layer; a smaller one uses their first columns and rows.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Delta
from ..base import Base
from ..config import PeftConfig
from ..errors import ConfigError, PeftWarning
from ..tuner import register_tuner


@dataclass
class VeraConfig(PeftConfig, method="VERA"):
    """Fields of VeRA. All adapters of a model have the same `projection_prng_key` and `save_projection`."""

    r: int = 256  # rank
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0  # seed of A and B
    save_projection: bool = True  # keep A and B in the checkpoint; otherwise the seed has to bring them back
    vera_dropout: float = 0.0  # on the input of A, while training
    d_initial: float = 0.1  # l_d at the start
    fan_in_fan_out: bool = False
    bias: str = "none"  # "all" or "vera_only": which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # False: l_b = 1, l_d normal
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    _bias_only: ClassVar[str] = "vera_only"

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("r")
        self.require_probability("vera_dropout")
        if not self.save_projection:
            warnings.warn(
                "With save_projection=False, vera_A and vera_B are not saved but drawn again from projection_prng_key, "
                "which may give other values on another system.",
                PeftWarning,
            )


class VeRA(Delta, config=VeraConfig):
    prefix = "vera_lambda_"
    shares = True

    @classmethod
    def keeps(cls, slot: str, config: Any) -> bool:
        return slot.startswith(cls.prefix) or (config.save_projection and slot in ("vera_A", "vera_B"))

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        for field in ("projection_prng_key", "save_projection"):
            for name, other in others.items():
                if getattr(other, field) != getattr(config, field):
                    raise ConfigError(
                        f"`{field}` must be the same for all VeRA adapters: they share vera_A and vera_B. "
                        f"Got {getattr(config, field)}, but adapter '{name}' has {getattr(other, field)}."
                    )

    @classmethod
    def share(cls, config: Any, bases: list[Base], existing: Any) -> dict[str, Any]:
        inp, out = max(base.inp for base in bases), max(base.out for base in bases)
        if existing("vera_A"):
            A, B = (next(iter(existing(slot).values())) for slot in ("vera_A", "vera_B"))
            for name, has, needs in (("vera_A", A.shape, (config.r, inp)), ("vera_B", B.shape, (out, config.r))):
                if has[0] < needs[0] or has[1] < needs[1]:
                    raise ConfigError(
                        f"{name} has a size of {tuple(has)} but {needs} or greater is required, and the adapters of a model "
                        "share it. Add the adapter with the larger rank or layers first."
                    )
            if len(A) > config.r:
                A, B = A[: config.r].clone(), B[:, : config.r].clone()
            return {"vera_A": A, "vera_B": B}
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        shapes = {"vera_A": (config.r, inp), "vera_B": (out, config.r)}
        return {name: uniform(shape, generator) for name, shape in shapes.items()}

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {key: t for key, t in tensors.items() if not key.startswith(("base_model.vera_A", "base_model.vera_B"))}
        if config.save_projection or len(own) == len(tensors):
            return tensors
        warnings.warn("save_projection is False: the checkpoint's vera_A and vera_B are not used.", PeftWarning)
        return own

    def build(self) -> None:
        c = self.config
        self.r = c.r
        self.vera_dropout = nn.Dropout(c.vera_dropout) if c.vera_dropout else nn.Identity()
        l_b, l_d = torch.ones(self.base.out), torch.randn(c.r)
        self.vera_lambda_b = nn.Parameter(torch.zeros_like(l_b) if c.init_weights else l_b)
        self.vera_lambda_d = nn.Parameter(torch.full_like(l_d, c.d_initial) if c.init_weights else l_d)

    @property
    def projections(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer."""
        l = self.vera_lambda_b
        return self.vera_A[:, : self.base.inp].to(l), self.vera_B[: self.base.out].to(l)

    def delta(self) -> Tensor:
        A, B = self.projections
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)  # (out, in)

    def branch(self, x: Tensor) -> Tensor:
        A, B = self.projections
        x = self.vera_dropout(self.cast(x, A))
        return self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(x, A), B)  # (..., out)


def uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming's uniform distribution for a ReLU: variance 2 / columns."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


VeraModel = register_tuner("VeraModel", "VERA")
