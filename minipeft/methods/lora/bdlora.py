"""BD-LoRA - Block-Diagonal LoRA. Wang et al., 2025, https://arxiv.org/abs/2510.23346.

    W' = W + s B A             A: (r, in), B: (out, r), B = 0 at the start, s as in LoRA; n = nblocks

    A = diag(A_1 .. A_n)       in layers that are split by input:  A_i (r / n, in / n), stored as rows of (r, in / n)
    B = diag(B_1 .. B_n)       in layers that are split by output: B_i (out / n, r / n), as rows of (out, r / n)
    parameters                 r (in / nblocks + out)

That is for layers split by input; those split by output train r (in + out / nblocks). Each of n devices that hold a
part of W then needs its own blocks alone. The factor that has no blocks is LoRA's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapter import Delta, Rows
from ...core.bases import effective_matrix, has_hooks
from ...core.errors import ConfigError, UnsupportedLayerError
from ...core.targets import pattern_value
from .lora import Factors, LoraConfig


class BlockDiagonalLinear(nn.Module):
    """diag(W_1 .. W_n) x. `weight` (out, in / n) holds the n blocks W_i (out / n, in / n) one below the other."""

    def __init__(self, in_features: int, out_features: int, nblocks: int, **options: Any):
        super().__init__()
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // nblocks, **options))

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight.unflatten(0, (self.nblocks, -1))  # (n, out / n, in / n)
        return torch.einsum("...ni,noi->...no", x.unflatten(-1, (self.nblocks, -1)), W).flatten(-2)  # (..., out)

    @property
    def matrix(self) -> Tensor:
        """The whole matrix, (out, in)."""
        return torch.block_diag(*self.weight.chunk(self.nblocks))


class BDLoRA(Factors, Delta, config=LoraConfig, variant="use_bdlora"):
    can_pad = False
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")  # PEFT: on bitsandbytes' layers a plain LoRA

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> Any:
        if config.init_lora_weights not in (True, False, "gaussian"):
            how = f"init_lora_weights={config.init_lora_weights!r}"
            raise ConfigError(f"BD-LoRA starts with True, False or 'gaussian': {how} computes factors without blocks.")
        return super().prepare(config, model)

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Any) -> None:
        if base.needs_weights:
            raise UnsupportedLayerError(f"BD-LoRA cannot adapt '{path}', a {base.label}.")
        n, sides = config.use_bdlora.nblocks, blocks_of(config.use_bdlora, path)
        if len(sides) == 2:
            raise ConfigError(f"'{path}' matches target_modules_bd_a and target_modules_bd_b; one factor has blocks.")
        if not sides and config.use_bdlora.match_strict:
            lists = "target_modules_bd_a nor target_modules_bd_b"
            raise ConfigError(f"'{path}' matches neither {lists}. match_strict=False makes it a plain LoRA.")
        r = pattern_value(config.rank_pattern, path, config.r)
        side = ("in_features", base.in_features) if "A" in sides else ("out_features", base.out_features)
        for name, size in [("r", r), side]:
            if sides and size % n:
                raise ConfigError(f"nblocks={n} must divide {name} of '{path}', which is {size}.")

    def build(self) -> None:
        super().build()
        options = {"device": self.device, "dtype": self.base.dtype}
        n, sides = self.config.use_bdlora.nblocks, blocks_of(self.config.use_bdlora, self.path)
        if "A" in sides:
            self.cast_to_base()
            self.lora_A = BlockDiagonalLinear(self.base.in_features, self.r, n, **options)
            nn.init.kaiming_uniform_(self.lora_A.weight)  # PEFT: also if init_lora_weights is not True
        if "B" in sides:
            # PEFT: no bias, zero also if False
            self.lora_B = BlockDiagonalLinear(self.r, self.base.out_features, n, **options)

    def branch(self, x: Tensor) -> Tensor:
        return self.scaling * self.lora_B(self.lora_A(self.dropped(x)))  # (..., out)

    def delta(self) -> Tensor:
        return self.delta_rows()(slice(None))  # (out, in)

    def delta_rows(self) -> Rows:
        A, B = matrix(self.lora_A), self.scaling * matrix(self.lora_B)
        return lambda rows: B[rows] @ A


def matrix(factor: Any) -> Tensor:
    """The whole matrix of a factor with blocks or without, with what hooks on it do."""
    return effective_matrix(factor) if has_hooks(factor) else getattr(factor, "matrix", factor.weight)


def blocks_of(config: Any, path: str) -> str:
    """Which factors of the layer at `path` have blocks: "A", "B" or none of them (or, which is refused, both)."""
    lists = {"A": config.target_modules_bd_a, "B": config.target_modules_bd_b}
    return "".join(side for side, patterns in lists.items() if any(part in path for part in patterns or ()))
