"""KappaTune: which layers to adapt, by the condition number of their weights. https://arxiv.org/abs/2506.16289

    kappa(W) = S_max / (S_min + 1e-8)            S: the singular values of W

A well-conditioned matrix (small kappa) is the least specialised one, so adapting it disturbs the least.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.kinds import base_of
from ..core.tuner import progress_bar

MOE_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """The condition numbers of a model's layers, computed once, and the layers that are best to adapt.

    Of a model without adapters: its `nn.Linear` modules (quantised ones count), and its stacked experts, 3-D parameters
    whose names end in one of `moe_param_suffixes`, each by the mean over its experts. Whatever has a side longer than
    `max_dim_size_to_analyze` is left out.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ):
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = tuple(moe_param_suffixes or MOE_SUFFIXES)
        self.show_progress = show_progress

    @functools.cached_property
    def _of_modules(self) -> dict[str, float]:
        bases: list[Any] = [(n, base_of(m)) for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        fitting = [(name, base) for name, base in bases if max(base.shape) <= self.max_dim_size_to_analyze]
        shown = progress_bar(fitting, "Condition numbers of linear layers", self.show_progress)
        return {name: condition_number(base.read()[0]) for name, base in shown}

    @functools.cached_property
    def _of_parameters(self) -> dict[str, float]:
        named = self.model.named_parameters()
        stacks = [(name, p) for name, p in named if p.dim() == 3 and name.endswith(self.moe_param_suffixes)]
        fitting = [(name, stack) for name, stack in stacks if max(stack.shape[1:]) <= self.max_dim_size_to_analyze]
        shown = progress_bar(fitting, "Condition numbers of experts", self.show_progress)
        return {name: condition_number(stack) for name, stack in shown}

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names for `target_modules`, best first: `num_modules` of them; else the share `top_p`, at least one; else
        those with a condition number of at most `threshold`; else all.
        """
        return _best(self._of_modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same for `target_parameters`."""
        return _best(self._of_parameters, top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` for a LoraConfig: the share `top_p`, from above 0 to 1, of each.

    The rest is as for `KappaTuneSelector`; None where there are no such layers. Raises `ConfigError` for another
    `top_p`.
    """
    if not 0 < top_p <= 1:
        raise ConfigError(f"`top_p` is a share, from above 0 to 1, got {top_p}.")
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    best = selector.get_best_target_parameters(top_p)
    return {"target_modules": selector.get_best_targets(top_p), "target_parameters": best or None}


@torch.no_grad()
def condition_number(W: Tensor) -> float:
    """kappa of W (rows, columns), or its mean over matrices W (n, rows, columns), computed in float32."""
    S = torch.linalg.svdvals(W.float())  # (..., min(rows, columns)), largest first
    return (S[..., 0] / (S[..., -1] + 1e-8)).mean().item()


def _best(kappas: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    best = sorted(kappas, key=kappas.__getitem__)
    if count is None and top_p is not None:
        count = max(1, int(len(best) * top_p))
    if count is None and threshold is not None:
        return [name for name in best if kappas[name] <= threshold]
    return best[:count]
