"""KaSA - Knowledge-aware Singular-value Adaptation. Wang et al., 2024, https://arxiv.org/abs/2412.06071.

    W' = W_k + s B diag(E) A       A: (r, in), E: (r,), B: (out, r), B = 0 and E normal at the start, s as in LoRA
    W_k                            W without its r smallest singular values, which takes its place in the frozen layer
    loss + sum over layers of      beta |E|^2 + gamma (|A A^T - I| + |B^T B - I|), in the Frobenius norm
    parameters                     r (in + out + 1)

The frozen layer keeps W_k when the adapter is disabled, deleted or unloaded, as in PEFT; W is only in the base model's
own checkpoint. Training adds `model._get_kasa_loss()` to its loss.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapter import Delta, Rows
from ...core.bases import Linear, inference_mode_off
from ...core.errors import ConfigError, MergeError, UnsupportedLayerError
from ...core.targets import pattern_value
from ...maths.rotations import from_orthonormal
from ...maths.svd import leading
from .initial import check_unmerged, leave, replace
from .lora import Factors, LoraConfig


class KaSA(Factors, Delta, config=LoraConfig, variant="kasa_config"):
    rewrites = True
    late: bool = False  # True: the weight had no values yet
    bases: ClassVar[tuple[str, ...]] = ("Linear",)

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Any) -> None:
        if type(base) is not Linear:
            kind = type(base.leaf).__name__
            raise UnsupportedLayerError(f"KaSA truncates the weights of plain nn.Linear layers; '{path}' is a {kind}.")
        r = pattern_value(config.rank_pattern, path, config.r)
        if r >= (k := min(base.in_features, base.out_features)):
            raise ConfigError(f"KaSA takes r singular values out of the weight of '{path}', which has {k}; got r={r}.")

    @classmethod
    def changes_base(cls, config: Any) -> bool:
        return True

    def build(self) -> None:
        super().build()
        self.lora_diag = nn.Parameter(torch.randn(self.r, device=self.device, dtype=self.base.dtype))

    @classmethod
    def after_build(cls, config: Any, adapters: list[Any]) -> None:
        left: dict[int, Tensor] = {}  # by weight: replicated layers share theirs
        for adapter in adapters:
            W = adapter.base.cell
            if W.is_meta:
                adapter.late = True
            else:
                before = left.get(id(W), adapter.residual)
                left[id(W)] = truncated(adapter.base.read()[0] if before is None else before, adapter.r)
                leave(adapter, left[id(W)])

    @inference_mode_off()
    def catch_up(self) -> None:
        """Truncate a weight that had no values yet when the adapter was added."""
        if self.base.device.type == "meta":
            raise ConfigError(f"The weight of '{self.path}' is on the meta device: load the model before running it.")
        check_unmerged(self)
        replace(self.base, truncated(self.base.read()[0], self.r))
        self.late = False

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.late:
            self.catch_up()
        return super().forward(x, inner, *args, **kwargs)

    def branch(self, x: Tensor) -> Tensor:
        return self.scaling * self.lora_B(self.lora_A(self.dropped(x)) * self.lora_diag)  # (..., out)

    def delta(self) -> Tensor:
        return self.delta_rows()(slice(None))  # (out, in)

    def delta_rows(self) -> Rows:
        if self.late:
            raise MergeError(f"KaSA was added to '{self.path}' before its weight was loaded: run the model once first.")
        A, B = self.base.matrix(self.lora_A), self.base.matrix(self.lora_B)
        A = A * (self.scaling * self.lora_diag[:, None])
        return lambda rows: B[rows] @ A

    def loss(self) -> Tensor:
        """beta |E|^2 + gamma (|A A^T - I| + |B^T B - I|), a scalar in at least float32."""
        c = self.config.kasa_config
        factors = self.lora_A.weight, self.lora_diag, self.lora_B.weight
        A, E, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in factors)
        return c.beta * E.square().sum() + c.gamma * (from_orthonormal(A) + from_orthonormal(B.mT))


def truncated(W: Tensor, r: int) -> Tensor:
    """W (out, in) without its r smallest singular values."""
    U, S, Vt = leading(W, min(W.shape) - r)  # (out, k - r), (k - r,), (k - r, in)
    return ((U * S) @ Vt).to(W.dtype)
