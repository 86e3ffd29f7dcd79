"""AdaMSS - Adaptive Multi-Subspace approach. Zheng et al., 2025, https://openreview.net/forum?id=8ZdWmpYxT0.

    [W' b'] = [W b] + S B A V    V: (r, in + 1), the r first right singular vectors of [W b], frozen
                                 A, B: a block for each subspace: A_k: (s, r), B_k: (n_k, s), B = 0 at the start
                                 S: (out, out), puts the n_k rows of each subspace where they belong
    parameters                   subspace_rank (num_subspaces r + out)

A subspace is a cluster of the rows of U, the left singular vectors (subspaces.py). With `use_asa`, those that
matter little are frozen while it trains (allocation.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Delta, Rows
from ...core.bases import Base
from ...core.config import PeftConfig, Positive
from ...core.errors import ConfigError, UnsupportedFeatureError
from .subspaces import principal, subspaces


@dataclass
class AdamssConfig(
    PeftConfig, method="ADAMSS", layers_need_list=True,
    optional=(
        "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval", "asa_importance_beta",
        "asa_uncertainty_beta", "asa_schedule_exponent", "svd_threshold",
    ),
):
    """Fields of AdaMSS. Steps are those that `update_and_allocate` is called with."""

    r: Positive = 100  # at most the smaller side of [W b]
    num_subspaces: Positive = 5  # K on each layer, at most one for each row
    subspace_rank: Positive = 1  # s, at most n_k and r
    target_modules: list[str] | str | None = None
    init_weights: Literal["orthogonal", False] | None = "orthogonal"  # None: B random
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    use_asa: bool = False  # freeze subspaces while training
    asa_target_subspaces: int = 50  # how many to train in the end, on all layers together
    init_warmup: int = 50  # the step after which that begins
    final_warmup: int = 1000  # the step at which it ends
    mask_interval: int = 100  # steps from one freezing to the next
    asa_importance_beta: float = 0.85  # decay of the moving average of the importance
    asa_uncertainty_beta: float = 0.85  # and of its uncertainty
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False  # s: how many singular values of U_k U_k^T are not small, at most `subspace_rank`
    svd_threshold: float = 0.1  # small: at most this share of the largest
    random_seed: int = 0  # of the decomposition

    def __post_init__(self):
        super().__post_init__()
        self.init_weights = self.init_weights or None
        if self.use_asa:
            self.require_positive("asa_target_subspaces", "mask_interval")
            self.require_probability("asa_importance_beta", "asa_uncertainty_beta")
            if self.init_warmup >= self.final_warmup:
                ends = f"got init_warmup={self.init_warmup}, final_warmup={self.final_warmup}"
                raise ConfigError(f"`init_warmup` must be smaller than `final_warmup`, {ends}.")
            if self.asa_schedule_exponent <= 0:
                raise ConfigError(f"`asa_schedule_exponent` must be above 0, got {self.asa_schedule_exponent}.")


class AdaMSS(Delta, config=AdamssConfig):
    prefix = "adamss_"

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        if base.device.type == "meta":
            raise UnsupportedFeatureError(f"AdaMSS needs the weights of '{path}', which are not loaded yet (meta).")

    @torch.no_grad()
    def build(self) -> None:
        W, b = self.layer.base.read()  # also where values follow: which row is in which subspace is not saved
        U, V = principal(W if b is None else torch.cat([W, b[:, None]], 1), self.config.r, self.config.random_seed)
        rows = subspaces(U, self.config.num_subspaces)
        A, B = zip(*(self.start(U[own]) for own in rows))
        self.num_subspaces = len(rows)
        self.scatter_index = torch.cat(rows)  # (out,), S: row of [A V] -> row of W
        self.adamss_newB = V  # (r, in + 1), or (r, in) without b
        self.adamss_A, self.adamss_B = nn.ParameterList(A), nn.ParameterList(B)
        if self.config.use_asa:
            self.reset_importance()

    def start(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """(A_k, B_k) of the subspace with the rows U (n_k, r)."""
        c, (n, r) = self.config, U.shape
        s = min(c.subspace_rank, n, r)
        Z = U @ U.t()
        if c.use_dynamic_rank:
            S = torch.svd_lowrank(Z, q=n, niter=2)[1]
            s = min(s, max(1, int((S > c.svd_threshold * S[0]).sum())))
        if self.base.on_meta:
            return torch.empty(s, r), torch.empty(n, s)
        Q = torch.linalg.qr(U.t() @ torch.svd_lowrank(Z, q=s, niter=2)[0])[0]  # (r, s)
        B = torch.zeros if c.init_weights else torch.randn
        return Q.t().contiguous(), 0.01 * B(n, s, dtype=self.base.dtype, device=self.device)

    def reset_importance(self) -> None:
        """Forget what `update_and_allocate` has noted."""
        for slot in ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B"):
            setattr(self, slot, [None] * self.num_subspaces)

    def factors(self) -> tuple[Tensor, Tensor]:
        """S B (out, k), A (k, r): k is the sum of the subspaces' ranks."""
        B = torch.block_diag(*self.adamss_B)
        return torch.zeros_like(B).index_copy(0, self.scatter_index, B), torch.cat([*self.adamss_A])

    def up(self) -> Tensor:
        """S B A (out, r)."""
        B, A = self.factors()
        return B @ A

    def delta(self) -> Tensor:
        return self.delta_rows()(slice(None))  # (out, in)

    def delta_rows(self) -> Rows:
        up, V = self.up(), self.adamss_newB[:, : self.base.in_features]
        return lambda rows: up[rows] @ V

    def branch(self, x: Tensor) -> Tensor:
        V, (B, A) = self.adamss_newB, self.factors()
        v = V[:, -1] if V.shape[1] > self.base.in_features else None  # what stands beside b
        h = F.linear(F.linear(self.cast(x, V), V[:, : self.base.in_features], v), A)  # (..., k)
        return h @ B.t().contiguous()  # (..., out): laid out like that, the gradient of B takes less time

    def fold_bias(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else b + self.up() @ self.adamss_newB[:, -1]
