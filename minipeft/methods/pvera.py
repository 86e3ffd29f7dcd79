"""PVeRA - Probabilistic Vector-based Random Matrix Adaptation. Fillioux et al., 2025, https://arxiv.org/abs/2512.07703.

    y = W x + l_b * (B z)        z ~ N(mu, diag(exp(v)))        (mu, v) = l_d * (A x)
    W' = W + diag(l_b) B diag(l_d[:r]) A[:r]                    with z = mu, the mean
    parameters                   2 r + out

    A: (2 r, in), B: (out, r), random, frozen and shared by all layers; l_d: (2 r,), l_b: (out,), l_b = 0 at the start

z is drawn while training, otherwise it is the mean. The shared matrices have the sizes of the largest layer; a smaller
one uses their first columns and rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Factored
from ..core.bases import dropout
from ..core.config import Probability
from ..core.errors import MergeError
from .projections import Projected, ProjectedConfig


@dataclass
class PveraConfig(ProjectedConfig, method="PVERA"):
    """Fields of PVeRA. All adapters of a model have the same `r`, `projection_prng_key` and `save_projection`."""

    pvera_dropout: Probability = 0.0  # on the input of A, while training
    d_initial: float = 0.1  # l_d at the start
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "pvera_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # False: l_b = 1, l_d normal
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    sample_at_inference: bool = False  # draw z also when not training; then there is no weight to merge
    generator_seed: int | None = None  # of the noise; None: torch's global generator


class PVeRA(Projected, Factored, config=PveraConfig):
    prefix = "pvera_lambda_"
    pair = ("pvera_A", "pvera_B")
    must_agree = ("r", "projection_prng_key", "save_projection")  # PEFT: fails with another r when it runs

    @classmethod
    def shapes(cls, config: Any, inp: int, out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (2 * config.r, inp), (out, config.r)

    def build(self) -> None:
        c = self.config
        self.r, self.sample_at_inference = c.r, c.sample_at_inference
        seeded = c.generator_seed is not None
        self.pvera_generator = torch.Generator("cpu").manual_seed(c.generator_seed) if seeded else None
        self.pvera_dropout = dropout(c.pvera_dropout)
        free = torch.randn(2 * c.r)
        self.pvera_lambda_b = nn.Parameter(torch.full((self.base.out_features,), 0.0 if c.init_weights else 1.0))
        self.pvera_lambda_d = nn.Parameter(torch.full_like(free, c.d_initial) if c.init_weights else free)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.sample_at_inference:  # PEFT: merges the mean, which is not what runs
            raise MergeError("sample_at_inference=True makes PVeRA random: no weight does the same. Set it to False.")
        l_b, l_d, r = self.pvera_lambda_b, self.pvera_lambda_d, self.r
        A, B = self.pvera_A[:r, : self.base.in_features].to(l_d), self.pvera_B[: self.base.out_features].to(l_d)
        return l_b[:, None] * B, l_d[:r, None] * A  # (out, r), (r, in)

    def branch(self, x: Tensor) -> Tensor:
        l_b, l_d = self.pvera_lambda_b, self.pvera_lambda_d
        A, B = self.pvera_A[:, : self.base.in_features].to(l_d), self.pvera_B[: self.base.out_features].to(l_d)
        mu, v = (l_d * F.linear(self.pvera_dropout(self.cast(x, l_d)), A)).chunk(2, -1)  # (..., r)
        return l_b * F.linear(self.sample(mu, v), B)  # (..., out)

    def sample(self, mu: Tensor, v: Tensor) -> Tensor:
        if not (self.layer.training or self.sample_at_inference):
            return mu
        # the generator stays on the CPU: a torch.Generator cannot be moved
        device = mu.device if self.pvera_generator is None else "cpu"
        noise = torch.randn(mu.shape, dtype=mu.dtype, device=device, generator=self.pvera_generator)
        return mu + torch.exp(v / 2) * noise.to(mu.device)
