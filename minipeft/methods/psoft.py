"""PSOFT - orthogonal fine-tuning in the principal subspace. Wu et al., 2025, https://arxiv.org/abs/2505.11235.

    W' = W + s B (R - I) A               s B A: W cut to its r largest singular values; A: (r, in), B: (out, r), frozen
    R = diag(b) C diag(a)                b, a: (r,), at first 1; C: (r, r), orthogonal, at first I
    C = (I + Q) (I - Q)^-1               Cayley; Q: (r, r) skew-symmetric, r (r - 1) / 2 numbers
    C = I + 2 Q + ... + 2 Q^t-2 + Q^t-1  Cayley-Neumann, with t terms
    parameters                           r (r + 3) / 2, or r (r + 2) with psoft_orth=False
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Factored
from ..core.bases import Base, dropout
from ..core.config import Bound, PeftConfig, Positive, Probability
from ..core.errors import ConfigError, PeftWarning
from ..maths.rotations import cayley, cayley_neumann, skew
from ..maths.svd import leading


@dataclass
class PsoftConfig(
    PeftConfig, method="PSOFT", layers_need_list=True,
    optional=("psoft_svd_lowrank_niter", "random_seed", "num_cayley_neumann_terms"),
):
    """Fields of PSOFT."""

    r: Positive = 32  # at most the smaller side of W
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    psoft_alpha: int = 32  # s = alpha / r
    psoft_dropout: Probability = 0.0  # on the input of A, while training
    fan_in_fan_out: bool = False  # weights stored (in, out); found out by itself
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"  # singular values in B, or half in each
    psoft_svd: Literal["full", "lowrank"] = "full"  # of W; "lowrank": its largest singular values, approximated
    psoft_svd_lowrank_niter: int = 10  # steps of that
    random_seed: int = 0  # of the "lowrank" decomposition
    psoft_orth: bool = True  # False: C is any matrix
    psoft_mag_b: bool = True  # False: no b
    psoft_mag_a: bool = True  # False: no a
    use_cayley_neumann: bool = False  # the series instead of the inverse
    num_cayley_neumann_terms: Annotated[int, Bound("at most 1000", lambda value: value <= 1000)] = 5  # t
    cayley_neumann_eps: float | None = None  # the largest Frobenius norm of Q
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # False: C random
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        idle = ["psoft_svd_lowrank_niter"] * (self.psoft_svd != "lowrank" and self.psoft_svd_lowrank_niter != 10)
        eps = self.cayley_neumann_eps
        if self.use_cayley_neumann:
            self.require_positive("num_cayley_neumann_terms")
            if eps is not None and not 0 < eps < 1:
                raise ConfigError(f"`cayley_neumann_eps` must lie between 0 and 1, got {eps}.")
        else:
            idle += ["num_cayley_neumann_terms"] * (self.num_cayley_neumann_terms != 5)
            idle += ["cayley_neumann_eps"] * (eps is not None)
        if idle:
            warnings.warn(f"PSOFT does not use {idle} with these settings: ignored.", PeftWarning)


class Rotation(nn.Module):
    """R. Its parameters: `weight`, the numbers above Q's diagonal or all of C; `vector_b` and `vector_a`."""

    def __init__(self, config: PsoftConfig):
        super().__init__()
        self.config, r = config, config.r
        C = torch.zeros(r * (r - 1) // 2) if config.psoft_orth else torch.eye(r)
        if not config.init_weights:
            C = nn.init.normal_(C, std=0.1) if config.psoft_orth else C + 0.1 * torch.randn_like(C)
        self.weight = nn.Parameter(C)
        self.vector_b = nn.Parameter(torch.ones(r)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if config.psoft_mag_a else None

    def matrix(self) -> Tensor:
        """R (r, r)."""
        R = self.orthogonal() if self.config.psoft_orth else self.weight
        R = R if self.vector_b is None else self.vector_b[:, None] * R
        return R if self.vector_a is None else R * self.vector_a

    def orthogonal(self) -> Tensor:
        """C (r, r) out of Q."""
        c, r = self.config, self.config.r
        Q = skew(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), r)
        if not c.use_cayley_neumann:
            return cayley(-Q)
        norm = Q.norm()
        if c.cayley_neumann_eps is not None and norm > c.cayley_neumann_eps:
            Q = Q * (c.cayley_neumann_eps / (norm + 1e-12))
        return cayley_neumann(Q, c.num_cayley_neumann_terms)


class PSOFT(Factored, config=PsoftConfig):
    prefix = "psoft_"

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        if config.r > min(base.in_features, base.out_features):
            most = min(base.in_features, base.out_features)
            raise ConfigError(f"`r` ({config.r}) must be at most {most}, the smaller side of '{path}'.")

    def build(self) -> None:
        c = self.config
        self.r, self.psoft_alpha, self.scaling = c.r, c.psoft_alpha, self.initial_scaling()
        self.psoft_dropout = dropout(c.psoft_dropout)
        self.psoft_R = Rotation(c)
        A, B = self.decompose()

        def keep() -> None:
            self._psoft_A_cache, self._psoft_B_cache = A, B

        self.on_commit(keep)  # not before: they stay in float32, whatever the model's dtype

    def initial_scaling(self) -> float:
        return self.config.psoft_alpha / self.config.r

    def decompose(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the frozen weight."""
        c, niter = self.config, self.config.psoft_svd_lowrank_niter if self.config.psoft_svd == "lowrank" else None
        U, S, Vt = leading(self.layer.base.read()[0], c.r, niter, c.random_seed)  # also where values follow: not saved
        S = S / self.scaling
        if c.ab_svd_init == "psoft_init":
            return Vt.contiguous(), U * S
        return S.sqrt()[:, None] * Vt, U * S.sqrt()

    def fixed(self) -> tuple[Tensor, Tensor]:
        """(A, B), anew where the model was on the meta device and has its weights since."""
        if self._psoft_A_cache.is_meta and not self.psoft_R.weight.is_meta:
            self._psoft_A_cache, self._psoft_B_cache = self.decompose()
        return self._psoft_A_cache, self._psoft_B_cache

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.fixed()
        R = self.psoft_R.matrix().to(A)
        return B @ (self.scaling * (R - torch.eye(len(R)).to(R))), A

    def branch(self, x: Tensor) -> Tensor:
        A, B = self.fixed()
        R = self.psoft_R.matrix().to(A)
        h = F.linear(self.psoft_dropout(self.cast(x, A)), A)  # (..., r)
        return F.linear(self.scaling * (F.linear(h, R) - h), B)  # (..., out)
