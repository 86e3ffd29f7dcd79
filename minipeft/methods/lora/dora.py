"""DoRA - Weight-Decomposed Low-Rank Adaptation. Liu et al., 2024, https://arxiv.org/abs/2402.09353, eq. 5.

    W' = m * (W + s B A) / |W + s B A|        A: (r, in), B: (out, r), m: (out,), |.|: norm of each row, held constant
    parameters                                r (in + out) + out

The norm comes from the factors, so that no (out, in) product is formed:

    |W + s B A|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B                   row by row
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapter import Parts
from ...core.errors import UnsupportedLayerError
from .lora import LoraConfig, LowRank


class Magnitude(nn.Module):
    """One trainable magnitude for each output feature."""

    caching: ClassVar[bool] = False  # True: outside of training the norms are kept from one pass to the next

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self._dora_cache: dict[Any, Tensor] = {}  # what the norms were made of -> the norms

    def train(self, mode: bool = True) -> Magnitude:
        self._dora_cache.clear()
        return super().train(mode)

    def norm(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """|W + s B A|, (out,); kept, with `caching`, until one of the tensors is another or was written to.

        What is written by way of `.data` torch does not tell; `train()` and `eval()` let go of all that is kept.
        """
        cache, tensors = self._dora_cache, (W, A, B)
        if not self.caching or self.training or any(t.is_inference() for t in tensors):
            if cache:
                cache.clear()
            return norm(W, A, B, s)
        made_of = (s, *((t.data_ptr(), t._version) for t in tensors))
        if made_of not in cache:
            cache.clear()
            cache[made_of] = norm(W, A, B, s)
        return cache[made_of]


class DoRA(LowRank, config=LoraConfig, variant="use_dora"):
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D", "Conv", "Embedding")
    fades = False

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Any) -> None:
        if base.needs_weights:
            raise UnsupportedLayerError(f"DoRA cannot adapt '{path}': attention has no row norms.")

    def build(self) -> None:
        super().build()
        self.cast_to_base()
        self.lora_magnitude_vector = Magnitude(self.at_start().view(self.base.magnitude_shape()))

    @torch.no_grad()
    def at_start(self) -> Tensor:
        """The row norms at the start, (out,); on the accelerator with `ephemeral_gpu_offload`."""
        W = self.base.read()[0] if self.residual is None else self.residual
        offload = self.config.runtime_config.ephemeral_gpu_offload and not W.is_meta
        there = torch.device("cuda") if offload else self.device
        W, A, B = (t.to(there) for t in (W, *self.factors()))
        return norm(W, A, B, self.scaling).to(self.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.base.matrix(self.lora_A), self.base.matrix(self.lora_B)  # (r, in), (out, r)

    def gain(self) -> Tensor:
        """m / |W + s B A|, (out,)."""
        W, (A, B) = self.base.read()[0].detach(), (t.detach() for t in self.factors())
        m = self.lora_magnitude_vector
        return m.weight.flatten() / m.norm(W, A, B, self.scaling)

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (..., out)
        b, gain, dropped = self.base.stored()[1], self.base.output_scale(self.gain()), self.dropped(x)
        if self.layer.training and isinstance(self.lora_dropout, nn.Dropout):  # PEFT: the gain acts on W dropout(x)
            W = self.base.read()[0]
            start = y + (gain - 1) * self.base.apply(dropped, W)
        else:
            start = y * gain if b is None else torch.addcmul(self.base.output_scale(b) * (1 - gain), y, gain)
        return self.base.add_low_rank(start, dropped, self.lora_A, self.lora_B, self.scaling, gain).to(y.dtype)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = self.gain()
        return gain.view(-1, *[1] * (W.dim() - 1)) * (W + self.delta()), self.gained(b, gain)

    def in_parts(self, b: Tensor | None) -> Parts:
        gain, (A, B) = self.gain(), self.factors()
        A = A * self.scaling
        return Parts(lambda W, rows: gain[rows, None] * (W + B[rows] @ A), self.gained(b, gain))

    def gained(self, b: Tensor | None, gain: Tensor) -> Tensor | None:
        """b, whose part that is not the frozen layer's has the gain."""
        b0 = self.base.read()[1]
        return b if b is None or b0 is None else b0 + gain * (b - b0)

    @classmethod
    def saved_key(cls, slot: str, rest: str) -> str:
        return slot if slot == "lora_magnitude_vector" else super().saved_key(slot, rest)  # PEFT: without ".weight"

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.removesuffix(".weight") if "lora_magnitude_vector" in key else key: t for key, t in tensors.items()}


def norm(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """|W + s B A| of each row, (out,), in at least float32."""
    W, dtype = W.flatten(1), torch.promote_types(W.dtype, torch.float32)
    if B.shape[1] < len(A):  # PEFT: the product for a convolution with groups, B being (out, r / groups), is not B A
        BA = (B.reshape(-1, len(A)) @ A).view(len(W), -1)  # (out, in / groups * taps)
        return torch.linalg.vector_norm(W + s * BA, dim=1, dtype=dtype)
    WW = torch.linalg.vector_norm(W, dim=1, dtype=dtype).square()  # |W|^2, (out,)
    A, B = A.to(dtype), B.t().to(dtype)  # (r, in), (r, out)
    C = torch.addmm(A @ W.t().to(dtype), A @ A.t(), B, beta=2 * s, alpha=s * s)  # (r, out)
    return (WW + (C * B).sum(0)).clamp_min_(0).sqrt_()
