"""(IA)^3 - Infused Adapter by Inhibiting and Amplifying Inner Activations.
Liu et al., 2022, https://arxiv.org/abs/2205.05638, section 3.3.

    y = l * (W x + b)            l: (out, 1)
    y = W (l * x) + b            l: (1, in), in feed-forward modules
    parameters                   out, or in with feedforward_modules=target_modules

Adapters combine as l = sum of w_i l_i; where a layer lacks one of them, its l_i is 1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import merging
from ..adapter import Activation
from ..config import PeftConfig
from ..errors import ConfigError, PeftWarning
from ..targets import named
from ..tuner import BaseTuner


@dataclass
class IA3Config(PeftConfig, method="IA3"):
    """Fields of (IA)^3; `feedforward_modules` are the targets that scale their input instead of their output."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None  # must be among target_modules
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True  # ones; otherwise standard normal

    def __post_init__(self):
        super().__post_init__()
        part, whole = self.feedforward_modules, self.target_modules
        if isinstance(part, set) and isinstance(whole, set) and not part <= whole:
            raise ConfigError("`feedforward_modules` should be a subset of `target_modules`")


class IA3(Activation, config=IA3Config):
    prefix = "ia3_"
    bases = ("Linear", "Conv1D", "Conv")

    def build(self) -> None:
        self.is_feedforward = named(self.path, self.config.feedforward_modules)
        n = self.base.inp if self.is_feedforward else self.base.out
        l = torch.randn(self.base.gain_shape(n, self.is_feedforward))
        self.ia3_l = nn.Parameter(torch.ones_like(l) if self.config.init_ia3_weights else l)

    def pre(self, x: Tensor) -> Tensor:
        return x * self.base.spread(self.ia3_l) if self.is_feedforward else x  # (..., in)

    def post(self, y: Tensor) -> Tensor:
        return y if self.is_feedforward else y * self.ia3_l.flatten()  # (..., out)


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
        for _, scratch, joins in plan.new:
            assert joins is not None
            own, l = parts[joins], scratch.adapters[adapter_name].ia3_l.data
            l.fill_(sum(map(float, weights)) - sum(w for w, _ in own))  # of the adapters that are not here
            for w, adapter in own:
                l += w * adapter.ia3_l.data
        merging.accept(plan)
