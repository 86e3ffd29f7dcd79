"""Which subspaces AdaMSS goes on training. Zheng et al., 2025, https://openreview.net/forum?id=8ZdWmpYxT0.

    I = |w dL/dw|                        of every entry w of A_k and B_k
    U <- beta2 U + (1 - beta2) |I - I'|  I' <- beta1 I' + (1 - beta1) I       both 0 at first
    S_k = mean(I' U) over A_k + mean(I' U) over B_k

Of all subspaces of the model, those with the largest S_k are trained on; the others keep their values from then on.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ...core.layer import layers
from ...model.tuner import BaseTuner


class AdamssModel(BaseTuner, method="ADAMSS"):
    """A model with AdaMSS adapters. With `use_asa`, call `update_and_allocate` in every training step."""

    def update_and_allocate(self, global_step: int) -> None:
        """Note how much each subspace matters, and freeze those that matter least when it is time.

        To be called in every step, after `backward()` and before the gradients are set to zero. Does nothing for
        adapters without `use_asa`, and outside of the steps from `init_warmup` to `final_warmup`.
        """
        for name in self.active_adapters:
            c = cast(Any, self.peft_config[name])
            adapters = [layer.adapters[name] for layer in layers(self.model) if name in layer.adapters]
            if not c.use_asa or not c.init_warmup <= global_step <= c.final_warmup:
                continue
            for adapter in adapters:
                update_importance(adapter)
            if global_step % c.mask_interval == 0:
                total = sum(adapter.num_subspaces for adapter in adapters)  # PEFT: of the adapter that came first
                freeze(adapters, budget(c, global_step, total))
                for adapter in adapters:
                    adapter.reset_importance()


def budget(c: Any, step: int, total: int) -> int:
    """How many of `total` subspaces are to be trained after a step."""
    left = 1 - (step - c.init_warmup) / (c.final_warmup - c.init_warmup)
    return int(c.asa_target_subspaces + (total - c.asa_target_subspaces) * left**c.asa_schedule_exponent)


@torch.no_grad()
def update_importance(adapter: Any) -> None:
    """Take the gradients of this step into I' and U. What is frozen has none, and stays unknown."""
    beta1, beta2 = adapter.config.asa_importance_beta, adapter.config.asa_uncertainty_beta
    for factors, mean, spread in (
        (adapter.adamss_A, adapter.exp_avg_ipt_A, adapter.exp_avg_unc_A),
        (adapter.adamss_B, adapter.exp_avg_ipt_B, adapter.exp_avg_unc_B),
    ):
        for k, w in enumerate(factors):
            if w.grad is not None:
                I, zero = (w * w.grad).abs(), torch.zeros_like(w)
                old, unc = (zero, zero) if mean[k] is None else (mean[k], spread[k])
                spread[k] = beta2 * unc + (1 - beta2) * (I - old).abs()
                mean[k] = beta1 * old + (1 - beta1) * I


@torch.no_grad()
def freeze(adapters: list[Any], keep: int) -> None:
    """Freeze the subspaces whose S_k is not among the largest of those that are known."""
    scores = {
        (adapter, k): ((I_A * U_A).mean() + (I_B * U_B).mean()).item()
        for adapter in adapters
        for k, (I_A, U_A, I_B, U_B) in enumerate(
            zip(adapter.exp_avg_ipt_A, adapter.exp_avg_unc_A, adapter.exp_avg_ipt_B, adapter.exp_avg_unc_B)
        )
        if I_A is not None and I_B is not None
    }
    if keep >= len(scores):
        return
    threshold = sorted(scores.values(), reverse=True)[keep - 1]
    for (adapter, k), score in scores.items():
        for w in (adapter.adamss_A[k], adapter.adamss_B[k]):
            w.requires_grad = score > threshold  # PEFT: so one fewer than `keep` are left
            w.grad = w.grad if w.requires_grad else None
