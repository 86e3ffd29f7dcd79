"""OSF - Orthogonal Subspace Fine-tuning. Nayak et al., 2025, https://arxiv.org/abs/2504.07097.

    W = U_high S_high V_high + U_0 S_0 V_0      singular value decomposition; high: the k largest values, frozen
    W' = W + U S V - U_0 S_0 V_0                U: (out, m), S: (m,), V: (m, in), m = min(out, in) - k
                                                at the start U, S, V = U_0, S_0, V_0
    The gradients of U and V lose what lies in the frozen directions: g - U_high U_high^T g, g - g V_high^T V_high.
    parameters                                  (min(in, out) - effective_rank) (in + out + 1)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Factored, Rows
from ..core.bases import Base
from ..core.config import PeftConfig
from ..core.errors import ConfigError, PeftWarning
from ..core.patterns import matches


@dataclass
class OSFConfig(PeftConfig, method="OSF"):
    """Fields of OSF. A rank is a number of singular values, or a share of them if it is a float up to 1."""

    effective_rank: int | float | None = None  # k; None: half
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, int | float] | None = None  # regular expression, found anywhere in the path -> k
    init_weights: bool | None = True  # False: U, S and V random
    modules_to_save: list[str] | None = None
    target_svd_config: dict[str, int] | None = None  # PEFT: not used

    def __post_init__(self):
        super().__post_init__()
        if self.target_svd_config:
            warnings.warn("OSF does not use `target_svd_config`: ignored.", PeftWarning)


class Project(torch.autograd.Function):
    """The identity, whose gradient is multiplied by I - K K^T (`away`) or K K^T; K: (n, k) with orthonormal columns."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, K: Tensor, away: bool) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, K, ctx.away = inputs
        ctx.save_for_backward(K)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (K,) = ctx.saved_tensors
        inside = K @ (K.t() @ grad)
        return grad - inside if ctx.away else inside, None, None


class OSF(Factored, config=OSFConfig):
    prefix = "osf_"
    patterns = ()  # rank_pattern is read in another way than other methods' patterns

    @classmethod
    def rank(cls, config: OSFConfig, path: str, base: Base) -> int:
        """k on one layer."""
        side = min(base.in_features, base.out_features)
        found = (k for pattern, k in (config.rank_pattern or {}).items() if matches(f".*({pattern}).*", path))
        k = next(found, config.effective_rank)
        if k is None:
            return side // 2
        return max(min(side, int(side * k) if isinstance(k, float) and 0 < k <= 1 else int(k)), 0)

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        if cls.rank(config, path, base) == 0:
            raise ConfigError(f"`effective_rank` freezes no singular value of '{path}'; it must freeze at least one.")

    def build(self) -> None:
        self.effective_rank = k = self.rank(self.config, self.path, self.base)
        W = self.base.read()[0].detach()
        U, S, V = torch.linalg.svd(W.to(torch.float32), full_matrices=False)  # PEFT: float32 also for float64 models
        U, S, V = U.to(W), S.to(W), V.to(W)
        low = U[:, k:].contiguous(), S[k:].contiguous(), V[k:].contiguous()
        self._osf_U_low_init, self._osf_S_low_init, self._osf_V_low_init = low
        if self.base.out_features > self.base.in_features:  # otherwise the rest of a square U is U_0
            self._osf_U_high = U[:, :k].contiguous()
        if self.base.in_features > self.base.out_features:
            self._osf_V_high = V[:k].contiguous()
        start = (torch.randn_like(t) if self.config.init_weights is False else t.clone() for t in low)
        self.osf_svd_params = nn.ParameterDict(dict(zip(("U_low", "S_low", "V_low"), start)))

    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, n), S and V (n, in), as they are now, of the part that is trained."""
        p, U0, V0 = self.osf_svd_params, self._osf_U_low_init, self._osf_V_low_init
        tall, wide = self.base.out_features > self.base.in_features, self.base.in_features > self.base.out_features
        U = Project.apply(p["U_low"], self._osf_U_high if tall else U0, tall)
        V = Project.apply(p["V_low"].t(), (self._osf_V_high if wide else V0).t(), wide).t()
        return U, p["S_low"], V

    def factors(self) -> tuple[Tensor, Tensor]:
        (U, S, V), U0, S0, V0 = self.trained(), self._osf_U_low_init, self._osf_S_low_init, self._osf_V_low_init
        return torch.cat([U * S, -U0 * S0], 1), torch.cat([V, V0])

    def delta_rows(self) -> Rows:
        (U, S, V), U0, S0, V0 = self.trained(), self._osf_U_low_init, self._osf_S_low_init, self._osf_V_low_init
        return lambda rows: (U[rows] * S) @ V - (U0[rows] * S0) @ V0
