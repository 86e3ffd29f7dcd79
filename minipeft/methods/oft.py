"""OFT - Orthogonal Fine-Tuning. Qiu et al., 2023, https://arxiv.org/abs/2306.07280, eq. 5.
Cayley-Neumann: OFTv2, Qiu et al., 2025, https://arxiv.org/abs/2506.19847, eq. 3.

    x' = x R,  y = W x' + b      R = diag(R_1, ..., R_r), R_i: (b, b) orthogonal, r b = in
    y' = y R                     on an embedding, r b = dim
    R_i = (I - Q)(I + Q)^-1      Q_i: (b, b) skew-symmetric, its upper triangle stored: (b (b - 1) / 2)
        ~ I + 2 Q + ... + 2 Q^(p-1) + Q^p          Cayley-Neumann
    |Q_i| <= eps / sqrt(r)       CoFT
    parameters                   in (oft_block_size - 1) / 2
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapter import Activation
from ..config import PeftConfig
from ..errors import CheckpointError, ConfigError, PeftWarning
from ..tuner import register_tuner


@dataclass
class OFTConfig(PeftConfig, method="OFT"):
    """Fields of OFT. Of `r` and `oft_block_size` exactly one is above 0; the other follows from each layer's size."""

    r: int = 0  # number of blocks
    oft_block_size: int = 32
    module_dropout: float = 0.0  # share of the blocks that do nothing, while training
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"  # which of the model's own biases are trained
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True  # R = I; otherwise Q normal, std 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False  # keep R near I
    eps: float = 6e-5  # how near
    block_share: bool = False  # one R_i for all i
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self):
        super().__post_init__()
        if min(self.r, self.oft_block_size) != 0 or max(self.r, self.oft_block_size) <= 0:
            raise ConfigError(
                "You can only specify either `r` or `oft_block_size`: one must be positive and the other 0, "
                f"but got r={self.r} and oft_block_size={self.oft_block_size}."
            )
        self.require_positive("num_cayley_neumann_terms")
        if not 0 <= self.module_dropout <= 1:
            raise ConfigError(f"`module_dropout` must lie between 0 and 1, got {self.module_dropout}.")
        if self.eps <= 0:
            raise ConfigError(f"`eps` must be above 0, got {self.eps}.")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        if "oft_block_size" not in kwargs:
            raise ConfigError(
                "An OFT adapter without `oft_block_size` is of peft < 0.14, which means another R. Train it again."
            )
        version = [int(n) for n in re.findall(r"\d+", kwargs.get("peft_version") or "0")[:2]]
        if kwargs.get("use_cayley_neumann") and version < [0, 18]:
            warnings.warn("This OFT adapter is of peft < 0.18, whose Cayley-Neumann series was another.", PeftWarning)
        return super().check_kwargs(**kwargs)


class Rotation(nn.Module):
    """The stored triangles of r blocks; `blocks()` are the orthogonal matrices that they stand for."""

    rows: Tensor
    cols: Tensor

    def __init__(self, r: int, size: int, config: OFTConfig, device: torch.device):
        super().__init__()
        self.size, self.config = size, config
        for name, index in zip(("rows", "cols"), torch.triu_indices(size, size, 1, device=device)):
            self.register_buffer(name, index.contiguous(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(r, size * (size - 1) // 2))
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)

    def blocks(self) -> Tensor:
        q: Tensor = self.weight  # (r, b (b - 1) / 2)
        if self.config.coft:
            q = q + (self.near(q) - q).detach()  # the gradient passes, as if the stored values were the near ones
        Q = q.new_zeros(len(q), self.size, self.size)
        Q[:, self.rows, self.cols] = q
        Q = Q - Q.mT  # (r, b, b)
        I = torch.eye(self.size, dtype=q.dtype, device=q.device)
        if not self.config.use_cayley_neumann:
            wide = torch.promote_types(q.dtype, torch.float32)  # there is no solver for bfloat16
            I, Q = I.to(wide), Q.to(wide)
            return torch.linalg.solve(I + Q, I - Q, left=False).to(q.dtype)
        terms = self.config.num_cayley_neumann_terms
        if terms < 3:
            return I + 2 * (terms - 1) * Q
        R = 2 * I + Q
        for _ in range(max(terms - 1, 3) - 1):  # PEFT: 3 terms are 4
            R = 2 * I + Q @ R
        return R - I

    def near(self, q: Tensor) -> Tensor:
        radius = self.config.eps / math.sqrt(2 * len(q))
        return q * (radius / q.norm(dim=1, keepdim=True)).clamp(max=1)


class BlockDropout(nn.Module):
    """While training, a share p of the blocks (r, b, b), chosen at random, becomes I. A single block stays."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, R: Tensor) -> Tensor:
        if not self.training or len(R) == 1:
            return R
        dropped = torch.randperm(len(R), device=R.device) < int(self.p * len(R))
        return torch.where(dropped[:, None, None], torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), R)


class OFT(Activation, config=OFTConfig):
    prefix = "oft_"
    bases = ("Linear", "Conv1D", "Conv", "Embedding")
    mixes = True  # PEFT: with groups, its blocks run over all input channels

    def build(self) -> None:
        c, n = self.config, self.base.patch
        field = "r" if c.r else "oft_block_size"
        wanted = getattr(c, field)
        value = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
        if value != wanted:
            warnings.warn(
                f"`{field}` must divide {n} on '{self.path}'. Adjusted from {wanted} to {value}.", PeftWarning
            )
        self.r, self.oft_block_size = (value, n // value) if c.r else (n // value, value)
        self.oft_dropout = BlockDropout(c.module_dropout) if c.module_dropout else nn.Identity()  # PEFT: never applied
        self.oft_R = Rotation(1 if c.block_share else self.r, self.oft_block_size, c, self.base.device)

    def pre(self, x: Tensor) -> Tensor:
        return self.rotate(x) if self.base.reads_vectors else x  # (..., in)

    def post(self, y: Tensor) -> Tensor:
        return y if self.base.reads_vectors else self.rotate(y)  # (..., dim)

    def rotate(self, x: Tensor) -> Tensor:
        R = self.oft_dropout(self.oft_R.blocks())  # (r, b, b)
        x = self.cast(x, R).unflatten(-1, (-1, R.shape[-1]))  # (..., r, b)
        return torch.einsum("...rk,rkc->...rc", x, R).flatten(-2)

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if any(".oft_r." in key for key in tensors):
            raise CheckpointError("OFT tensors named `oft_r` are of peft <= 0.15 and mean another R. Train it again.")
        return tensors


OFTModel = register_tuner("OFTModel", "OFT")
