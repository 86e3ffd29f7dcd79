"""Combining (IA)^3 adapters: l = sum of w_i l_i; where a layer lacks one of them, its l_i is 1."""

from __future__ import annotations

import warnings

from ..core.errors import ConfigError, PeftWarning
from ..core.layer import adapter_parts
from ..core.offload import onload
from ..model.tuner import BaseTuner
from .lora import merging


class IA3Model(BaseTuner, method="IA3"):
    """A model with (IA)^3 adapters."""

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add `adapter_name`, the weighted sum of `adapters`; it is frozen and not active.

        Raises `PeftError`, with nothing changed, when they cannot be combined: on one layer all of them must scale the
        input, or all the output. When `adapter_name` is there already, warns and does nothing.
        """
        if adapter_name in self.peft_config:
            warnings.warn(f"Adapter {adapter_name} exists already; nothing was combined.", PeftWarning, stacklevel=2)
            return
        parts = merging.parts_of(self, adapters, weights)
        for own in parts.values():
            if len({adapter.is_feedforward for _, adapter in own}) > 1:
                raise ConfigError(f"Of the adapters on '{own[0][1].path}' some scale its input and others its output.")
        plan = merging.plan_union(
            self,
            adapter_name,
            adapters,
            parts,
            fits=lambda new, own: new.is_feedforward == own[0][1].is_feedforward,
            fields={"target_modules": lambda own: True, "feedforward_modules": lambda own: own[0][1].is_feedforward},
        )
        with onload(*adapter_parts(self.model)):
            for _, scratch, joins in plan.new:
                assert joins is not None
                own, l = parts[joins], scratch.adapters[adapter_name].ia3_l.data
                l.fill_(sum(map(float, weights)) - sum(w for w, _ in own))  # of the adapters that are not here
                for w, adapter in own:
                    l += w * adapter.ia3_l.data
        merging.accept(plan, parts)
