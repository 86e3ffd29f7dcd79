"""Which singular values AdaLoRA keeps. Zhang et al., 2023, https://arxiv.org/abs/2303.10512, eq. 7 to 11, appendix A.

    I = |w dL/dw|                        of every entry w of A, E and B
    I' <- beta1 I' + (1 - beta1) I       U <- beta2 U + (1 - beta2) |I - I'|
    s(w) = I' U
    S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)

Of all S_i of the model the `budget` largest keep their E_i, the others' are set to 0. The budget goes from all to
`target_r` for each layer, along a cubic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import PeftError
from ...core.layer import adapted

Pattern = dict[str, list[bool]]  # which singular values are left, by the name of E
SLOTS = ("lora_A", "lora_E", "lora_B")
TOO_LATE = "Call `update_and_allocate` in every step from 0 on, after backward() and before zero_grad()."


class RankAllocator:
    """The budget of one adapter of `model`, and the importance (`exp_avg_ipt`, `exp_avg_unc`) of its parameters."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str):
        self.model, self.peft_config, self.adapter_name = model, peft_config, adapter_name
        adapters = self.adapters()
        self.init_bgt = sum(len(adapter.lora_E) for adapter in adapters.values())
        self.target_bgt = peft_config.target_r * len(adapters)
        self.reset_ipt()

    def adapters(self) -> dict[str, Any]:
        """The adapter of each layer, by the name of its E."""
        name = self.adapter_name
        return {
            f"{live}.lora_E.{name}": layer.adapters[name]
            for _, live, layer in adapted(self.model)
            if name in layer.adapters and hasattr(layer, "lora_E")
        }

    def set_total_step(self, total_step: int) -> None:
        """Change the length of the training."""
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget all importance."""
        self.exp_avg_ipt: dict[tuple[str, str], Tensor] = {}
        self.exp_avg_unc: dict[tuple[str, str], Tensor] = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """(number of singular values to keep, whether to prune) at a step."""
        c = self.peft_config
        last = c.total_step - c.tfinal
        if step <= c.tinit:
            return self.init_bgt, False
        if step > last:
            return self.target_bgt, True
        left = 1 - (step - c.tinit) / (last - c.tinit)
        return int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt), step % c.deltaT == 0

    @torch.no_grad()
    def update_ipt(self) -> None:
        """Take the gradients of this step into the importance. A parameter without one did not matter."""
        beta1, beta2 = self.peft_config.beta1, self.peft_config.beta2
        found = {(key, slot): getattr(adapter, slot) for key, adapter in self.adapters().items() for slot in SLOTS}
        if all(w.grad is None for w in found.values()):
            raise PeftError(f"There are no gradients. {TOO_LATE}")
        for key, w in found.items():
            I = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
            zero = torch.zeros_like(w)
            mean = beta1 * self.exp_avg_ipt.get(key, zero) + (1 - beta1) * I
            self.exp_avg_ipt[key] = mean
            self.exp_avg_unc[key] = beta2 * self.exp_avg_unc.get(key, zero) + (1 - beta2) * (I - mean).abs()

    @torch.no_grad()
    def mask_to_budget(self, budget: int) -> Pattern:
        """Set all but the `budget` most important singular values to 0. Returns which are left, by the name of E."""
        if not self.exp_avg_ipt:
            raise PeftError(f"Nothing is known about the importance of the singular values. {TOO_LATE}")
        scores = {}
        for key in self.adapters():
            A, E, B = (self.exp_avg_ipt[key, slot] * self.exp_avg_unc[key, slot] for slot in SLOTS)
            scores[key] = (E.flatten() + (A.mean(1) + B.mean(0))).cpu()  # (r,)
        together = torch.cat(list(scores.values()))
        surplus = len(together) - budget
        threshold = torch.kthvalue(together, surplus)[0] if surplus > 0 else -1
        pattern = {key: (score > threshold).tolist() for key, score in scores.items()}
        self.mask_using_rank_pattern(pattern)
        return pattern

    @torch.no_grad()
    def mask_using_rank_pattern(self, rank_pattern: Pattern | None) -> None:
        """Set the singular values that `rank_pattern` leaves out to 0."""
        if rank_pattern is None:
            raise PeftError(f"There is no rank_pattern. {TOO_LATE}")
        for key, adapter in self.adapters().items():
            left = rank_pattern.get(key) or rank_pattern[key.removesuffix(f".{self.adapter_name}")]
            if len(left) == len(adapter.lora_E):  # a loaded adapter holds only what is left
                mask = torch.tensor(left, device=adapter.lora_E.device)
                adapter.lora_E.masked_fill_(~mask[:, None], 0.0)

    def update_and_allocate(self, global_step: int, force_mask: bool = False) -> tuple[int, Pattern | None]:
        """One step. Returns the budget, and which singular values are left if it pruned."""
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt()
        budget, prune = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(budget) if prune or force_mask else None
