"""Super-Tuning - training the entries of W that are largest, or smallest. https://arxiv.org/abs/2607.09287.

    W' = W + D + (alpha / r) B A        D: (out, in), 0 but for (1 - sparsity) out in entries v, where |W| is largest
                                        A: (r, in), B: (out, r), B = 0 at the start; only with `r` ("Supra")
    parameters  floor((1 - sparsity) in out) + r (in + out), or floor((1 - sparsity) in out) with r=None
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Delta
from ..core.bases import Base, dropout
from ..core.config import PeftConfig, Positive, Probability
from ..core.errors import ConfigError, PeftWarning, UnsupportedLayerError
from ..maths.draw import redraw
from ..maths.sparse import added


@dataclass
class SupertuningConfig(PeftConfig, method="SUPERTUNING"):
    """Fields of Super-Tuning. All adapters of a model have the same `save_precomputed_indices`."""

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    sparsity: Probability = 0.99  # share of the entries that stay frozen
    select_top: bool = True  # train the largest |W|; otherwise the smallest
    r: Positive | None = None  # rank of B A; None: no such term
    lora_alpha: float | None = None  # None: 2 r
    lora_dropout: Probability = 0.0  # on the input of A, while training
    init_weights: bool = True  # v = 0, B = 0; otherwise random
    save_precomputed_indices: bool = True  # save where the entries stand; otherwise W has to bring them back

    def __post_init__(self):
        super().__post_init__()
        if self.r is not None:
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        elif self.lora_alpha is not None:
            raise ConfigError("`lora_alpha` scales the low-rank term, which needs `r`: set both or none.")
        if not self.save_precomputed_indices:
            how = "found again from the base weights, which must be exactly those of the training"
            warnings.warn(f"With save_precomputed_indices=False the trained entries are {how}.", PeftWarning)


class SuperTuning(Delta, config=SupertuningConfig):
    prefix = "supertuning_"
    must_agree = ("save_precomputed_indices",)

    @classmethod
    def is_saved(cls, slot: str, config: Any) -> bool:
        return config.save_precomputed_indices if slot == "supertuning_indices" else super().is_saved(slot, config)

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        if not entries(config, base):
            raise UnsupportedLayerError(
                f"sparsity={config.sparsity} trains none of the {base.in_features * base.out_features} entries of "
                f"'{path}'; lower it."
            )

    def build(self) -> None:
        c, n = self.config, entries(self.config, self.base)
        size = self.base.read()[0].detach().abs().flatten()
        self.supertuning_indices = torch.topk(size, n, largest=c.select_top)[1].to(torch.int32)
        self.supertuning_values = nn.Parameter(torch.zeros(n) if c.init_weights else torch.randn(n))
        self.supertuning_rank, self.supertuning_lora_alpha = c.r or 0, float(c.lora_alpha or 0)
        if c.r is None:
            return
        self.supertuning_lora_A, self.supertuning_lora_B = self.base.down(c.r), self.base.up(c.r)
        redraw(self.supertuning_lora_A, self.supertuning_lora_B, zero=c.init_weights)
        self.supertuning_lora_dropout = dropout(c.lora_dropout)

    def index_bound(self, slot: str) -> Any:
        return self.base.out_features * self.base.in_features if slot == "supertuning_indices" else None

    def delta(self) -> Tensor:
        return self.fold(self.supertuning_values.new_zeros(self.base.shape), None)[0]  # (out, in)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        W = added(W, self.supertuning_values, self.supertuning_indices)
        if self.supertuning_rank:
            A, B = self.base.matrix(self.supertuning_lora_A), self.base.matrix(self.supertuning_lora_B)
            W = torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=self.scale)
        return W, b

    @property
    def scale(self) -> float:
        return self.supertuning_lora_alpha / self.supertuning_rank

    @property
    def by_weight(self) -> bool:
        return not (self.supertuning_rank and self.layer.training and self.config.lora_dropout)

    def branch(self, x: Tensor) -> Tensor:
        values = self.supertuning_values
        y = self.base.apply(x, added(values.new_zeros(self.base.shape), values, self.supertuning_indices))  # (..., out)
        if not self.supertuning_rank:
            return y
        A, B = self.supertuning_lora_A, self.supertuning_lora_B
        return self.base.add_low_rank(y, self.cast(self.supertuning_lora_dropout(x), A.weight), A, B, self.scale)


def entries(config: SupertuningConfig, base: Base) -> int:
    """How many entries of a layer's weight are trained."""
    return int(base.in_features * base.out_features * (1 - config.sparsity))
