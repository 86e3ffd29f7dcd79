"""KappaTune: which layers to adapt, by the condition number of their weights. https://arxiv.org/abs/2506.16289

    kappa(W) = S_max / (S_min + 1e-8)            S: the singular values of W

A well-conditioned matrix (small kappa) is the least specialised one, so adapting it disturbs the least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.kinds import base_of
from ..core.tuner import progress_bar

MOE_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


@torch.no_grad()
def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` for a LoraConfig, best first: the well-conditioned ones.

    The share `top_p`, from above 0 to 1, of the `nn.Linear` modules of a model without adapters (quantised ones count),
    and the same share of the stacked experts: 3-D parameters whose names end in one of `moe_param_suffixes`; None where
    there are none. An expert stack counts by the mean over its experts. At least one of each kind is taken; whatever
    has a side longer than `max_dim_size_to_analyze` is left out. Raises `ConfigError` for another `top_p`.
    """
    if not 0 < top_p <= 1:
        raise ConfigError(f"`top_p` is a share, from above 0 to 1, got {top_p}.")
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    suffixes = tuple(moe_param_suffixes or MOE_SUFFIXES)
    stacks = [(name, p) for name, p in model.named_parameters() if p.dim() == 3 and name.endswith(suffixes)]
    of_module, of_stack = {}, {}
    for name, module in progress_bar(modules, "Condition numbers of linear layers", show_progress):
        base: Any = base_of(module)
        if max(base.shape) <= max_dim_size_to_analyze:
            of_module[name] = condition_number(base.read()[0])
    for name, stack in progress_bar(stacks, "Condition numbers of experts", show_progress):
        if max(stack.shape[1:]) <= max_dim_size_to_analyze:
            of_stack[name] = condition_number(stack)
    return {"target_modules": _best(of_module, top_p), "target_parameters": _best(of_stack, top_p) or None}


def condition_number(W: Tensor) -> float:
    """kappa of W (rows, columns), or its mean over matrices W (n, rows, columns), computed in float32."""
    S = torch.linalg.svdvals(W.float())  # (..., min(rows, columns)), largest first
    return (S[..., 0] / (S[..., -1] + 1e-8)).mean().item()


def _best(kappas: dict[str, float], top_p: float) -> list[str]:
    return sorted(kappas, key=kappas.__getitem__)[: max(1, int(len(kappas) * top_p))]
