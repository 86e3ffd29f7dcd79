"""Poly - Polytropon. Ponti et al., 2022, https://arxiv.org/abs/2202.13914; with n_splits > 1
Multi-Head Routing, Caccia et al., 2022, https://arxiv.org/abs/2211.03831.

    y = W x + b + B_t A_t x / r  A_t = sum_s a_ts A_s: (r, in), B_t = sum_s a_ts B_s: (out, r), for a sample of task t
    a_t = z_t / sum(z_t)         z_t = sigmoid(Z_t), while training a relaxed Bernoulli draw with logits Z_t: (skills,)
    parameters    n_skills r (in + out) + n_tasks n_splits n_skills

The n_splits parts of the input and of the output each have skills and logits of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from ..core.adapter import Routed
from ..core.bases import Base
from ..core.config import Count, PeftConfig, Size
from ..core.errors import BatchError


@dataclass
class PolyConfig(PeftConfig, method="POLY"):
    """Fields of Poly. A model with it is run with `task_ids` (batch,), whole numbers from 0 to n_tasks - 1."""

    r: Size = 8  # rank
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True  # B = 0; otherwise uniform, as A is
    poly_type: Literal["poly"] = "poly"
    n_tasks: Size = 1
    n_skills: Count = 4
    n_splits: Size = 1  # must divide the numbers of input and of output features


NO_TASKS = "This adapter differs by task: `task_ids` must be given to the model, one number for each sample."


class Router(nn.Module):
    """The logits Z (tasks, splits * skills), and the mixing weights that they give."""

    def __init__(self, config: PolyConfig):
        super().__init__()
        self.shape = (config.n_splits, config.n_skills)
        self.module_logits = nn.Parameter(torch.empty(config.n_tasks, math.prod(self.shape)))

    def forward(self, tasks: Tensor) -> Tensor:
        """Mixing weights (batch, splits, skills) of the samples' tasks (batch,)."""
        Z = self.module_logits[tasks].unflatten(1, self.shape)
        z = RelaxedBernoulli(Z.new_tensor(1.0), logits=Z).rsample() if self.training else torch.sigmoid(Z)
        return z / (z.sum(-1, keepdim=True) + 1e-12)


class Poly(Routed, config=PolyConfig):
    prefix = "poly_"
    inputs = ("task_ids",)

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        base.require_divisible(config.n_splits, "n_splits", path)

    @classmethod
    def per_sample(cls, config: Any, inputs: dict[str, Any]) -> Tensor:
        """The task of each sample: (batch,)."""
        if (given := inputs.get("task_ids")) is None:
            raise BatchError(NO_TASKS)
        tasks = torch.as_tensor(given)
        if tasks.dim() != 1 or tasks.is_floating_point() or tasks.dtype == torch.bool:
            got = f"{tasks.dtype} of shape {tuple(tasks.shape)}"
            raise BatchError(f"`task_ids` must hold one whole number for each sample, got {got}.")
        if len(tasks) and not 0 <= int(tasks.min()) <= int(tasks.max()) < config.n_tasks:
            raise BatchError(f"`task_ids` must lie between 0 and {config.n_tasks - 1}, got {tasks.tolist()}.")
        return tasks

    def build(self) -> None:
        c = self.config
        self.r, self.n_tasks, self.n_skills, self.n_splits = c.r, c.n_tasks, c.n_skills, c.n_splits
        self.poly_type = c.poly_type
        A = uniform(c.n_skills, c.n_splits, c.r, self.base.in_features // c.n_splits)
        shape = c.n_skills, c.n_splits, self.base.out_features // c.n_splits, c.r
        B = torch.zeros(shape) if c.init_weights else uniform(*shape)
        self.poly_router = Router(c)
        self.poly_lora_A = nn.Parameter(A.permute(1, 0, 3, 2).contiguous())  # (splits, skills, in / splits, r)
        self.poly_lora_B = nn.Parameter(B.permute(1, 0, 3, 2).contiguous())  # (splits, skills, r, out / splits)
        nn.init.uniform_(self.poly_router.module_logits, -1e-3, 1e-3)

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (batch, ..., out)
        if (tasks := self.layer.context.now.sample_values(self.name, len(x))) is None:
            raise BatchError(NO_TASKS)
        a = self.poly_router(tasks.to(x.device))  # (batch, splits, skills)
        A = torch.einsum("bqs,qsdr->bqdr", a, self.poly_lora_A).flatten(1, 2)  # (batch, in, r)
        B = torch.einsum("bqs,qsrd->brqd", a, self.poly_lora_B).flatten(2)  # (batch, r, out)
        h = self.cast(x, A).reshape(len(x), -1, x.shape[-1])  # (batch, positions, in)
        return (y + (h.bmm(A).bmm(B) / self.r).view(y.shape)).to(y.dtype)


def uniform(skills: int, splits: int, n_out: int, n_in: int) -> Tensor:
    """(skills, splits, n_out, n_in) matrices, each initialised as nn.Linear initialises its weight."""
    W = torch.empty(skills, splits, n_out, n_in)
    for matrix in W.flatten(0, 1):
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return W
