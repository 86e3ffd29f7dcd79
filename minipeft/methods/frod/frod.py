"""FRoD - Full-Rank fine-tuning with Rotational Degrees. Wan et al., 2025, https://arxiv.org/abs/2512.23485.

    W' = U (S + diag(l)) V^T        U: (out, in), V: (in, in), frozen; at the start S = 0 and W' = W
                                    l: (in,); S: (in, in), some random entries off the diagonal, the others 0
    parameters                      in + max(floor(sparse_rate in^2), 1)

The layers that do the same in each block share V, made from all their weights (basis.py). U and the first l make
W = U diag(l) V^T, with columns of length 1 in U.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Delta, Rows
from ...core.bases import Base, dropout, has_hooks
from ...core.config import PeftConfig, Probability, Share
from ...core.errors import PeftWarning
from ...maths.sparse import dense
from .basis import SHARED, role, shared_by_group, split


@dataclass
class FrodConfig(PeftConfig, method="FROD"):
    """Fields of FRoD. All adapters of a model have the same `projection_prng_key` and `save_projection`."""

    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0  # seed of the positions in S
    save_projection: bool = True  # keep V in the checkpoint; otherwise it has to be made again from the base model
    frod_dropout: Probability = 0.0  # on the input, while training
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "frod_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # False: S and l with noise
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    sparse_rate: Share = 0.01  # how much of S is set
    regularization_alpha: float = 1e-3
    progressbar: bool = True  # while V is made
    runtime_offload_base_weight: bool = False  # not used: the frozen weights stay where they are

    def __post_init__(self):
        super().__post_init__()
        if self.runtime_offload_base_weight:
            warnings.warn("`runtime_offload_base_weight` is ignored: frozen weights stay where they are.", PeftWarning)


class FRoD(Delta, config=FrodConfig):
    prefix = "frod_lambda_"
    shares = True
    must_agree = ("projection_prng_key", "save_projection", "runtime_offload_base_weight")
    fresh: tuple[Any, Any] = (None, None)  # V and the U that was computed from it, until the adapter is accepted

    @classmethod
    def is_saved(cls, slot: str, config: Any) -> bool:
        return slot.startswith(cls.prefix) or (config.save_projection and slot.startswith(SHARED))

    @classmethod
    def group(cls, path: str) -> str:
        return role(path)

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        return shared_by_group(config, found, existing)

    @classmethod
    def shared_index_bound(cls, slot: str, shared: Mapping[str, Tensor]) -> Any:
        kind, _, group = slot.partition(".")
        return len(shared[f"frod_V.{group}"]) if kind == "frod_s_indices" else None

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {key: t for key, t in tensors.items() if not key.startswith(tuple(f"base_model.{s}." for s in SHARED))}
        if config.save_projection or len(own) == len(tensors):
            return tensors
        warnings.warn("save_projection is False: the checkpoint's V and positions are not used.", PeftWarning)
        return own

    def build(self) -> None:
        c = self.config
        self.r, self.runtime_offload_base_weight = self.base.out_features, c.runtime_offload_base_weight
        self.frod_dropout = dropout(c.frod_dropout)
        l = torch.empty(self.base.in_features)
        if not self.base.on_meta:
            U, l = split(self.base.read()[0].detach(), self.frod_V)
            self.fresh = self.frod_V, U
        s = l.new_zeros(self.frod_s_indices.shape[1])
        if not c.init_weights:
            nn.init.normal_(s, std=0.1)
            l = l + 0.1 * torch.randn_like(l)
        self.frod_lambda_l, self.frod_lambda_s_values = nn.Parameter(l), nn.Parameter(s)
        self.on_commit(self.after_load)

    def after_load(self) -> None:
        (V, U), self.fresh = self.fresh, (None, None)
        if V is not self.frod_V:  # PEFT: U stays as it was, whatever V is loaded
            U = split(self.base.read()[0].detach(), self.frod_V)[0]
        self.frod_U = U

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, in), S + diag(l) (in, in) and V (in, in)."""
        l = self.frod_lambda_l
        return self.frod_U.to(l), middle(l, self.frod_lambda_s_values, self.frod_s_indices), self.frod_V.to(l)

    def delta(self) -> Tensor:
        U, M, V = self.factors()
        return U @ M @ V.t() - self.base.read()[0].to(U)  # (out, in)

    def delta_rows(self) -> Rows:
        (U, M, V), W0 = self.factors(), self.base.read()[0]
        return lambda rows: U[rows] @ M @ V.t() - W0[rows].to(U)

    def rebuilt(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        """W' x + b."""
        l, s = self.frod_lambda_l, self.frod_lambda_s_values
        U, V = self.frod_U.to(l), self.frod_V.to(l)
        h = self.cast(x, U) @ V
        return F.linear(Middle.apply(h, l, s, self.frod_s_indices) if len(s) else h * l, U, b)  # (..., out)

    def branch(self, x: Tensor) -> Tensor:
        x = self.frod_dropout(self.cast(x, self.frod_lambda_l))
        return self.rebuilt(x) - self.base.apply(x, self.base.read()[0])  # (..., out)

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        dropping = self.frod_dropout.training and self.config.frod_dropout
        base = self.base
        if dropping or inner is not base or base.module is not base.leaf or has_hooks(base.leaf):
            return super().forward(x, inner, *args, **kwargs)
        b = base.read()[1]
        b = None if b is None else b.to(self.frod_lambda_l)
        return self.rebuilt(x, b).to(x.dtype)  # W x would be added and taken away again


def middle(l: Tensor, s: Tensor, positions: Tensor) -> Tensor:
    """S + diag(l) (in, in)."""
    M = dense(s, positions, len(l), len(l))
    M.diagonal().add_(l)
    return M


class Middle(torch.autograd.Function):
    """(S + diag(l)) h: for the gradients the matrix is made again, which takes less memory than keeping it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, l: Tensor, s: Tensor, positions: Tensor) -> Tensor:
        return F.linear(h, middle(l, s, positions))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, l, s, positions = ctx.saved_tensors
        n = len(l)
        h_grad = grad @ middle(l, s, positions).to(grad) if ctx.needs_input_grad[0] else None  # no autocast does that
        M_grad = grad.reshape(-1, n).t() @ h.reshape(-1, n).to(grad)
        return h_grad, M_grad.diag(), M_grad[tuple(positions.long())], None
