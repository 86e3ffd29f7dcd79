"""BOFT - Orthogonal Fine-Tuning via Butterfly Factorization.
Liu et al., 2023, https://arxiv.org/abs/2311.06243, section 4.

    W' = diag(s) W F_1^T ... F_m^T      s: (out,), 1 at the start; F_k = P_k R_k P_k^T: (in, in)
    R_k = diag(R_k1, ..., R_kd)         R_ki = (I - Q)(I + Q)^-1: (b, b), Q = (A_ki - A_ki^T) / 2, d b = in
                                        A: (m, d, b, b), 0 at the start
    P_1 = I; P_k: in each run of 2^(k-1) b inputs, cut into pieces of b / 2, all odd pieces come before all even ones
    parameters                          boft_n_butterfly_factor in boft_block_size + out
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Parts, Transform
from ..core.bases import Base
from ..core.config import Count, PeftConfig, Share
from ..core.errors import CheckpointError, UnsupportedLayerError
from ..maths.rotations import FactorDropout, cayley


@dataclass
class BOFTConfig(PeftConfig, method="BOFT", optional=("boft_n_butterfly_factor",)):
    """Fields of BOFT. Of `boft_block_size` and `boft_block_num` exactly one is above 0; the other follows."""

    boft_block_size: int = 4  # b
    boft_block_num: int = 0  # d
    boft_n_butterfly_factor: Count = 1  # m
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    boft_dropout: Share = 0.0  # share of the blocks of one factor that do nothing, while training
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # otherwise A and s are moved by normal noise, std 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.require_one_of("boft_block_size", "boft_block_num")


class BOFT(Transform, config=BOFTConfig):
    prefix = "boft_"
    bases = ("Linear", "Conv1D", "Conv")

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        n, m = base.patch_size, config.boft_n_butterfly_factor
        field = "boft_block_size" if config.boft_block_size else "boft_block_num"
        size = getattr(config, field)
        if n % size:
            raise UnsupportedLayerError(f"`{field}` ({size}) must divide the {n} inputs of '{path}'.")
        b, d = (size, n // size) if field == "boft_block_size" else (n // size, size)
        if m > 1 and (b % 2 or d % 2 ** (m - 1)):
            raise UnsupportedLayerError(
                f"With boft_n_butterfly_factor={m} the blocks must be of even size, and their number a multiple of "
                f"{2 ** (m - 1)}, but '{path}' would have {d} blocks of size {b}."
            )

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without P, which follows from the configuration: peft < 0.13 saved it."""
        m = config.boft_n_butterfly_factor
        if m > 1 and any(key.endswith(".boft_R") and t.shape[:1] == (1,) for key, t in tensors.items()):
            raise CheckpointError(
                f"The checkpoint has one factor, and `boft_n_butterfly_factor` is {m}: PEFT trains one, and saves it, "
                "where it has no CUDA kernel. Write 1 into the configuration."
            )
        return {key: t for key, t in tensors.items() if not key.endswith(".boft_P")}

    def build(self) -> None:
        c, n = self.config, self.base.patch_size
        b = self.boft_block_size = c.boft_block_size or n // c.boft_block_num
        d = self.boft_block_num = n // b
        self.boft_dropout = FactorDropout(c.boft_dropout) if c.boft_dropout else nn.Identity()
        A = torch.zeros(c.boft_n_butterfly_factor, d, b, b)
        s = torch.ones(self.base.gain_shape(self.base.out_features, False)[:2])  # (out, 1), on convolutions (1, out)
        if not c.init_weights:
            A, s = A.normal_(0.0, 0.1), s.normal_(1.0, 0.1)
        self.boft_R, self.boft_s = nn.Parameter(A), nn.Parameter(s)

    def rotations(self) -> Tensor:
        """The blocks R (m, d, b, b)."""
        A = self.boft_R
        return self.boft_dropout(cayley((A - A.mT) / 2))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = self.boft_s.view(-1, 1) * self.turned(self.base.rows(W), self.rotations())  # (out, in)
        return rows.view(len(W), -1, *W.shape[2:]), b

    def in_parts(self, b: Tensor | None) -> Parts:
        R, s = self.rotations(), self.boft_s.view(-1, 1)
        return Parts(lambda W, rows: s[rows] * self.turned(W, R), b)

    def turned(self, rows: Tensor, R: Tensor) -> Tensor:
        """`rows` (n, in) through the factors with the blocks R."""
        rows, half = rows.to(R.dtype), self.boft_block_size // 2
        for k, blocks in enumerate(R):
            if k:
                rows = rows.unflatten(1, (-1, 2, 2**k, half)).transpose(2, 3).flatten(1)
            rows = torch.einsum("onc,nbc->onb", rows.unflatten(1, (-1, self.boft_block_size)), blocks).flatten(1)
            if k:
                rows = rows.unflatten(1, (-1, 2**k, 2, half)).transpose(2, 3).flatten(1)
        return rows
