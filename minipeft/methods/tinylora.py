"""TinyLoRA - Learning to Reason in 13 Parameters. Morris et al., 2026, https://arxiv.org/abs/2602.04118.

    W' = W + B R A        R = sum_i v_i P_i        B A: the best approximation of W of rank r
    parameters            u, or u in all with weight_tying=1.0

    A = sqrt(S) V^T: (r, in) and B = U sqrt(S): (out, r) from the singular value decomposition of W, frozen
    P: (u, r, r), random and frozen; v: (u,), the only trained tensor, shared by neighbouring layers (`weight_tying`)

An embedding is decomposed as it is stored, (tokens, dim): there B is (tokens, r), A is (r, dim), and dW = (B R A)^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, Factored
from ..core.bases import Base, dropout
from ..core.config import PeftConfig, Positive, Probability, Share
from ..maths.svd import leading
from .projections import warn_unless_saved


@dataclass
class TinyLoraConfig(PeftConfig, method="TINYLORA", optional=("init_v_bound",)):
    """Fields of TinyLoRA. All adapters of a model have the same `save_projection`."""

    r: Positive = 2  # rank, at most that of the layer
    u: Positive = 64  # length of v
    weight_tying: Share = 0.0  # 0: each layer has its own v; 1: all have the same
    projection_seed: int = 42  # of P
    save_projection: bool = True  # keep P in the checkpoint; otherwise the seed has to bring it back
    init_v_bound: float = 0.02  # with init_weights="uniform", v is drawn from [-bound, bound]
    target_modules: list[str] | str | None = None
    tinylora_dropout: Probability = 0.0  # on the input of A (for embeddings: on what B looks up), while training
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "tinylora_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_weights: bool | Literal["uniform"] = True  # v = 0, as for False (PEFT: unset)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        warn_unless_saved(self, "tinylora_P", seed="projection_seed")

    def group(self, index: int, layers: int) -> int:
        """Which v the layer `index` of `layers` has: 0, 1, ..."""
        groups = max(1, round(layers * (1.0 - self.weight_tying)))
        return min(index // max(1, layers // groups), groups - 1)


class TinyLoRA(Factored, config=TinyLoraConfig):
    prefix = "tinylora_"
    bases = ("Linear", "Conv1D", "Embedding")
    shares = True
    must_agree = ("save_projection",)

    @classmethod
    def is_saved(cls, slot: str, config: Any) -> bool:
        return config.save_projection if slot == "tinylora_P" else super().is_saved(slot, config)

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        v = nn.ParameterDict()
        for index, (_, base) in enumerate(found):
            if (key := str(config.group(index, len(found)))) not in v:
                v[key] = nn.Parameter(torch.zeros(config.u, dtype=base.dtype))
                if config.init_weights == "uniform":
                    nn.init.uniform_(v[key], -config.init_v_bound, config.init_v_bound)
        return {"tinylora_v": v}

    def build(self) -> None:
        c = self.config
        self.tinylora_dropout = dropout(c.tinylora_dropout)
        W = self.base.read()[0]
        W = W if self.base.reads_vectors else W.t()
        r = min(c.r, *W.shape)
        self.u, self.r = c.u, r
        U, S, Vt = (t.to(W.dtype) for t in leading(W, r))
        self.tinylora_A = (S.sqrt()[:, None] * Vt).contiguous()
        self.tinylora_B = (U * S.sqrt()).contiguous()

    @classmethod
    def after_build(cls, config: Any, adapters: list[Adapter]) -> None:
        for index, adapter in enumerate(adapters):
            generator = torch.Generator("cpu").manual_seed(config.projection_seed + index)
            P = torch.normal(0.0, adapter.r**-0.5, (config.u, adapter.r, adapter.r), generator=generator)
            adapter.tinylora_P = adapter.layer.cast_to_base(P)
            adapter.tinylora_group = str(config.group(index, len(adapters)))

    @property
    def R(self) -> Tensor:
        v = self.tinylora_v[self.tinylora_group]
        return torch.einsum("i,ijk->jk", v, self.tinylora_P.to(v))  # (r, r)

    def factors(self) -> tuple[Tensor, Tensor]:
        R = self.R
        up, down = self.tinylora_B.to(R) @ R, self.tinylora_A.to(R)
        return (up, down) if self.base.reads_vectors else (down.t(), up.t())

    def branch(self, x: Tensor) -> Tensor:
        R = self.R
        if self.base.reads_vectors:  # factor by factor: of them R alone has a gradient, and B R would have one
            h = F.linear(self.tinylora_dropout(self.cast(x, R)), self.tinylora_A.to(R))
            return F.linear(F.linear(h, R), self.tinylora_B.to(R))
        return self.tinylora_dropout(self.base.apply(x, self.tinylora_B.to(R).t())) @ R @ self.tinylora_A.to(R)
