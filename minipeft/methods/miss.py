"""MiSS - Matrix Shard Sharing. Kang and Yin, 2024, https://arxiv.org/abs/2409.15371.

    W' = W + [D D ... D]                 D: (out, r), its transpose stored, D = 0 at the start; the last D is cut to fit
    W' = W + [D ... D], D = [E; ...; E]  E: (mini_r, r), its transpose stored; init_weights="mini"
    W'_ij = W_ij + W_ij D_i + D_i        W_ij: the (r, r) blocks of W, D_i: (r, r); init_weights="bat"
    parameters                           r out, or r mini_r with init_weights=mini
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import Adapter, Delta, Parts, Rows, Transform
from ..core.bases import Base, dropout
from ..core.config import PeftConfig, Positive, Probability
from ..core.errors import ConfigError
from ..maths.draw import uniform


@dataclass
class MissConfig(PeftConfig, method="MISS", layers_need_list=True, optional=("mini_r",)):
    """Fields of MiSS. `init_weights` chooses the variant as well."""

    r: Positive = 64  # width of a shard
    miss_dropout: Probability = 0.0  # on the input of the adapter, while training; not for "bat"
    mini_r: Positive = 1  # height of a shard, for "mini"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["bat", "mini"] = True  # False: D random
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None
    bias: Literal["none", "all", "MiSS_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None


class Shards(Adapter):
    """What the variants share: the one block of parameters. Gives `block`, its shape."""

    prefix = "miss_"

    @classmethod
    def block(cls, config: MissConfig, path: str, base: Base) -> tuple[int, ...]:
        """The shape of the block. Raises `ConfigError` when it does not fit the layer."""
        raise NotImplementedError

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        if config.r > base.in_features:
            most = f"in_features ({base.in_features}) of '{path}'"
            raise ConfigError(f"`r` ({config.r}) must be less than or equal to {most}.")
        cls.block(config, path, base)

    def build(self) -> None:
        c = self.config
        self.miss_r, self.miss_mini_r = c.r, c.mini_r
        self.miss_dropout = dropout(c.miss_dropout)
        self.miss_block = uniform(*self.block(c, self.path, self.base), zero=c.init_weights is not False)


class MiSS(Shards, Delta, config=MissConfig):
    @classmethod
    def chosen_by(cls, config: Any) -> bool:
        return config.init_weights != "bat"

    @classmethod
    def block(cls, config: MissConfig, path: str, base: Base) -> tuple[int, ...]:
        if config.init_weights != "mini":
            return config.r, base.out_features
        base.require_divisible(config.mini_r, "mini_r", path, sides="out_features")
        return config.r, config.mini_r

    def delta(self) -> Tensor:
        (r, height), (out, inp) = self.miss_block.shape, self.base.shape
        return self.miss_block.t().repeat(out // height, -(-inp // r))[:, :inp]  # (out, in)

    def delta_rows(self) -> Rows:
        (r, height), n = self.miss_block.shape, self.base.in_features
        column = lambda rows: torch.arange(rows.start, rows.stop, device=self.miss_block.device) % height
        return lambda rows: self.miss_block[:, column(rows)].t().repeat(1, -(-n // r))[:, :n]

    def branch(self, x: Tensor) -> Tensor:
        E = self.miss_block  # (r, out), or (r, mini_r)
        x = self.cast(x, E)
        if short := -x.shape[-1] % len(E):
            x = F.pad(x, (0, short))
        y, times = self.miss_dropout(x).unflatten(-1, (-1, len(E))).sum(-2) @ E, self.base.out_features // E.shape[1]
        return y if times == 1 else torch.cat([y] * times, -1)  # (..., out)


class Bat(Shards, Transform, config=MissConfig):
    @classmethod
    def chosen_by(cls, config: Any) -> bool:
        return config.init_weights == "bat"

    @classmethod
    def block(cls, config: MissConfig, path: str, base: Base) -> tuple[int, ...]:
        base.require_divisible(config.r, "r", path)
        return base.out_features // config.r, config.r, config.r

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turned(W, self.miss_block), b

    def in_parts(self, b: Tensor | None) -> Parts:
        D, r = self.miss_block, self.miss_block.shape[1]
        return Parts(lambda W, rows: self.turned(W, D[rows.start // r : rows.stop // r]), b, step=r)

    def turned(self, W: Tensor, D: Tensor) -> Tensor:
        n, r, _ = D.shape  # out / r, or fewer
        blocks = W.to(D).unflatten(1, (-1, r)).unflatten(0, (n, r)).transpose(1, 2)  # (out / r, in / r, r, r)
        blocks = blocks + blocks @ D[:, None] + D[:, None]
        return blocks.transpose(1, 2).reshape(W.shape)
