"""SHiRA - Sparse High Rank Adapters. Bhardwaj et al., 2024, https://arxiv.org/abs/2406.13175, section 3.

    W' = W + s D                 D: (out, in), 0 but for r (in + out) trained entries, where a mask (out, in) is 1
    parameters                   r (in + out)

The entries' places are drawn at random, or given by a function f(layer, r, **kwargs) -> mask: set `config.mask_fn = f`
before the adapter is made.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Delta
from ..core.bases import Base
from ..core.config import PeftConfig, Positive
from ..core.errors import ConfigError, PeftWarning, UnsupportedLayerError
from ..maths.sparse import added
from ..maths.sparse import random_mask as random_mask


@dataclass
class ShiraConfig(PeftConfig, method="SHIRA"):
    """Fields of SHiRA. Attribute `mask_fn`: `random_mask`, or a function of your own; it is not saved."""

    r: Positive = 32  # as many trained entries as LoRA of this rank
    mask_type: str = "random"  # anything else: `mask_fn` has to be set
    random_seed: int | None = None
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True  # zeros; otherwise standard normal
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.mask_fn = random_mask if self.mask_type == "random" else None
        if self.mask_fn is None and not self.inference_mode:
            warnings.warn(f"mask_type {self.mask_type!r} is not built in; set `config.mask_fn`.", PeftWarning)


class SHiRA(Delta, config=ShiraConfig):
    prefix = "shira_"

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        n, size = config.r * (base.in_features + base.out_features), base.in_features * base.out_features
        if n > size:
            raise UnsupportedLayerError(f"r={config.r} trains {n} entries, more than the {size} of '{path}'; lower it.")

    def build(self) -> None:
        c, n = self.config, self.config.r * (self.base.in_features + self.base.out_features)
        self.r, self.scaling = c.r, 1.0
        self.shira_weight = nn.Parameter(torch.zeros(n) if c.init_weights else torch.randn(n))
        indices = torch.zeros(2, n, dtype=torch.int) if self.base.on_meta else self.positions(n)
        self.layer.put("shira_indices", self.name, indices)  # PEFT: in the checkpoint, but not in the state dict

    def index_bound(self, slot: str) -> Any:
        return (self.base.out_features, self.base.in_features) if slot == "shira_indices" else None

    def positions(self, n: int) -> Tensor:
        """Rows and columns (2, n) of the mask's entries."""
        c = self.config
        if c.mask_fn is None:
            raise ConfigError(f"mask_type is {c.mask_type!r}: set `config.mask_fn` to f(layer, r, **kwargs).")
        kwargs = {"random_seed": c.random_seed} if c.mask_type == "random" else {}
        mask, shape = c.mask_fn(self.base.leaf, c.r, **kwargs), (self.base.out_features, self.base.in_features)
        ones = int((mask == 1).sum())
        if mask.shape != shape or ones != n:
            raise ConfigError(
                f"For '{self.path}' `mask_fn` must give a mask of shape {shape} with {n} ones, "
                f"but gave one of shape {tuple(mask.shape)} with {ones}."
            )
        return torch.stack(torch.where(mask == 1)).to(torch.int)

    def delta(self) -> Tensor:
        return self.fold(self.shira_weight.new_zeros(self.base.shape), None)[0]  # (out, in)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows, columns = self.shira_indices
        return added(W, self.shira_weight * self.scaling, rows.long() * W.shape[1] + columns), b
