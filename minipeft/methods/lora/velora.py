"""VeLoRA - rank-1 sub-token projections. Miles et al., 2024, https://arxiv.org/abs/2405.17991.

    W' = W + s B A                  A: (r, in), B: (out, r), B = 0 at the start, s as in LoRA
    parameters                      r (in + out), or r (in + out) + out with lora_bias=True

For the gradient of A, not the input x of a layer is kept but num_groups numbers z for each token. x is cut into
sub-tokens x_g of d = ceil(in / num_groups) features (the last ones filled up with zeros), and v is one direction:

    z_g = x_g . v,  x~_g = scale z_g v,  dL/dA = (dL/dh)^T x~         h = A x: (tokens, r), v: (d,), |v| = 1

v is random, or the mean of all sub-tokens: those of each batch, or of the first one only. It is saved, not trained.
Outputs, the gradients of x and B, and merging are LoRA's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lora import LoraConfig, Summed


class VeLoRA(Summed, config=LoraConfig, variant="velora_config"):
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")

    def build(self) -> None:
        super().build()
        c, base = self.config.velora_config, self.base
        d = -(-base.in_features // c.num_groups)
        drawn = c.init_type == "random"
        options: dict[str, Any] = {"dtype": base.dtype, "device": self.device}
        self.lora_velora_embed = unit(torch.randn(d, **options)) if drawn else torch.zeros(d, **options)  # (d,)
        self.put_values(
            lora_velora_initialized=drawn,
            lora_velora_num_groups=c.num_groups,
            lora_velora_init_type=c.init_type,
            lora_velora_scale=c.scale,
        )

    @torch.no_grad()
    def look_at(self, x: Tensor) -> None:
        """Take v from the batch x, where that is the time for it."""
        how, v = self.lora_velora_init_type, self.lora_velora_embed
        if how == "random" or (how == "batch_average_once" and self.lora_velora_initialized):
            return
        if how == "batch_average" or not v.any():  # PEFT: "once" is once more after loading, whatever was saved
            mean = subtokens(x, self.lora_velora_num_groups).flatten(0, 1).mean(0)  # (d,)
            self.lora_velora_embed = unit(mean).to(v)  # a new tensor: a graph may hold the old one
        self.put_values(lora_velora_initialized=True)

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (..., out)
        x = self.dropped(x)
        if self.layer.training and torch.is_grad_enabled():
            self.look_at(x)
            v, n, scale = self.lora_velora_embed, self.lora_velora_num_groups, self.lora_velora_scale
            h = Compressed.apply(x, self.lora_A.weight, v, n, scale)  # (..., r)
        else:
            h = self.lora_A(x)
        return (y + self.scaling * self.lora_B(h)).to(y.dtype)


class Compressed(torch.autograd.Function):
    """A x, which keeps z (tokens, n) in the place of x (..., in) for the gradient of A (r, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, n: int, scale: float) -> Tensor:
        ctx.save_for_backward(subtokens(x, n) @ v.to(x.dtype), A, v)
        ctx.x, ctx.scale = (x.shape, x.dtype), scale
        return F.linear(x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, A, v = ctx.saved_tensors
        (shape, dtype), g = ctx.x, g.reshape(-1, g.shape[-1])  # (tokens, r)
        x_grad = A_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (g @ A.to(g.dtype)).view(shape).to(dtype)
        if ctx.needs_input_grad[1]:
            rebuilt = torch.einsum("tn,d->tnd", z.to(g.dtype), v.to(g.dtype)).flatten(1)[:, : shape[-1]] * ctx.scale
            A_grad = (g.t() @ rebuilt).to(A.dtype)  # (r, in)
        return x_grad, A_grad, None, None, None


def subtokens(x: Tensor, n: int) -> Tensor:
    """x (..., in) as n sub-tokens for each token, (tokens, n, d), filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % n)).reshape(-1, n, -(-x.shape[-1] // n))


def unit(v: Tensor) -> Tensor:
    """v / |v| in its dtype, computed in float32 as in PEFT; all features alike where v is zero."""
    wide = v.float()
    wide = torch.where(wide.any(), wide, torch.ones_like(wide))
    return (wide / torch.linalg.vector_norm(wide)).to(v.dtype)
