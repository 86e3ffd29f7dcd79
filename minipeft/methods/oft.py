"""OFT - Orthogonal Fine-Tuning. Qiu et al., 2023, https://arxiv.org/abs/2306.07280, eq. 2 to 4.
Cayley-Neumann: OFTv2, Qiu et al., 2025, https://arxiv.org/abs/2506.19847, section 3.3.

    W' = W R^T                   R = diag(R_1, ..., R_r), R_i: (b, b) orthogonal, r b = in
    y' = R^T y                   y: what is looked up, on an embedding, r b = dim
    R_i = (I - Q)(I + Q)^-1      Q_i: (b, b) skew-symmetric, its upper triangle stored: (b (b - 1) / 2)
    R_i = I + 2 Q + ... + 2 Q^(p-1) + Q^p      Cayley-Neumann, p + 1 terms of the series of (I + Q)(I - Q)^-1
    |Q_i| <= eps / sqrt(r)       CoFT
    parameters                   in (oft_block_size - 1) / 2
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Activation, Parts
from ..core.config import ABOVE_ZERO, Count, PeftConfig, Share
from ..core.errors import CheckpointError, ConfigError, PeftWarning
from ..maths.rotations import BlockDropout, cayley, cayley_neumann, skew


@dataclass
class OFTConfig(PeftConfig, method="OFT", optional=("eps",)):
    """Fields of OFT. Of `r` and `oft_block_size` exactly one is above 0; the other follows from each layer's size."""

    r: int = 0  # number of blocks
    oft_block_size: int = 32  # b
    module_dropout: Share = 0.0  # share of the blocks that do nothing, while training
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"  # which of the model's own biases are trained
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True  # R = I; otherwise Q normal, std 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False  # keep R near I
    eps: Annotated[float, ABOVE_ZERO] = 6e-5  # how near
    block_share: bool = False  # one R_i for all i
    use_cayley_neumann: bool = True  # the series instead of the inverse
    num_cayley_neumann_terms: Count = 5  # p + 1

    def __post_init__(self):
        super().__post_init__()
        self.require_one_of("r", "oft_block_size")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        if "oft_block_size" not in kwargs:
            raise ConfigError("OFT without `oft_block_size` is of peft < 0.14 and means another R. Train it again.")
        version = [int(n) for n in re.findall(r"\d{1,9}", str(kwargs.get("peft_version") or 0))[:2]]
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
        c = self.config
        q: Tensor = self.weight  # (r, b (b - 1) / 2)
        if c.coft:
            q = q + (self.near(q) - q).detach()  # the gradient passes, as if the stored values were the near ones
        here = self.rows.device == q.device  # not where the triangles were assigned to a model on the meta device
        Q = skew(q, self.size, (self.rows, self.cols) if here else None)  # (r, b, b)
        if not c.use_cayley_neumann:
            return cayley(Q).to(q.dtype)
        terms = c.num_cayley_neumann_terms
        return cayley_neumann(Q, 4 if terms == 3 else terms)  # PEFT: 3 terms are 4

    def near(self, q: Tensor) -> Tensor:
        radius = self.config.eps / math.sqrt(2 * len(q))
        return q * (radius / q.norm(dim=1, keepdim=True)).clamp(max=1)


class OFT(Activation, config=OFTConfig):
    prefix = "oft_"
    embedding_slots = {"oft_R": "oft_embedding_R"}
    bases = ("Linear", "Conv1D", "Conv", "Embedding")
    mixes = True  # PEFT: with groups, its blocks run over all input channels

    def build(self) -> None:
        c, n = self.config, self.base.patch_size
        field = "r" if c.r else "oft_block_size"
        wanted = getattr(c, field)
        value = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
        if value != wanted:
            what = f"`{field}` must divide {n} on '{self.path}'"
            warnings.warn(f"{what}. Adjusted from {wanted} to {value}.", PeftWarning)
        self.r, self.oft_block_size = (value, n // value) if c.r else (n // value, value)
        self.oft_dropout = BlockDropout(c.module_dropout) if c.module_dropout else nn.Identity()  # PEFT: never applied
        self.oft_R = Rotation(1 if c.block_share else self.r, self.oft_block_size, c, self.base.device)

    def pre(self, x: Tensor) -> Tensor:
        return self.rotate(x) if self.base.reads_vectors else x  # (..., in)

    def adjoint(self, rows: Tensor) -> Tensor:
        return self.rotate(rows, back=True) if self.base.reads_vectors else rows

    def post(self, y: Tensor) -> Tensor:
        return y if self.base.reads_vectors else self.rotate(y)  # (..., dim)

    def in_parts(self, b: Tensor | None) -> Parts:
        R = self.blocks().mT
        return Parts(lambda W, rows: self.turned(W, R), b)

    def rotate(self, x: Tensor, back: bool = False) -> Tensor:
        R = self.blocks()
        return self.turned(x, R.mT if back else R)

    def blocks(self) -> Tensor:
        return self.oft_dropout(self.oft_R.blocks())  # (r, b, b)

    def turned(self, x: Tensor, R: Tensor) -> Tensor:
        x = self.cast(x, R).unflatten(-1, (-1, R.shape[-1]))  # (..., r, b)
        return torch.einsum("...rk,rkc->...rc", x, R).flatten(-2)

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if any(key.endswith(".oft_r") for key in tensors):
            raise CheckpointError("OFT tensors named `oft_r` are of peft <= 0.15 and mean another R. Train it again.")
        return tensors
