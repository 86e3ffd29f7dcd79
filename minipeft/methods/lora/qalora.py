"""QA-LoRA - Quantization-Aware LoRA. Xu et al., 2023, https://arxiv.org/abs/2309.14717.

    W' = W + s k B A P         A: (r, k), B: (out, r), B = 0 at the start, s as in LoRA; k = in / g groups of inputs
    P x                        mean of each group of g = qalora_group_size inputs; P: (k, in), entries 0 and 1 / g
    parameters                 r (in / qalora_group_size + out)

W' - W is constant within a group, as is the zero that a GPTQ layer keeps for each group. PEFT does this on GPTQ layers
alone: on all others `use_qalora` leaves a plain LoRA.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.errors import ConfigError, PeftWarning
from ...core.quantised import GPTQ
from .lora import LoRA, LoraConfig, LowRank


class QALoRA(LowRank, config=LoraConfig, variant="use_qalora"):
    @classmethod
    def for_base(cls, base: Any) -> type[Adapter]:
        return cls if isinstance(base, GPTQ) else LoRA

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Any) -> None:
        g = config.qalora_group_size
        base.require_divisible(g, f"qalora_group_size={g}", path, "in_features")
        if config.lora_bias or config.init_lora_weights not in (True, False, "gaussian"):
            how = f"lora_bias={config.lora_bias}, init_lora_weights={config.init_lora_weights!r}"
            raise ConfigError(f"QA-LoRA has no bias, and starts with True, False or 'gaussian'. Got {how}.")

    @classmethod
    def after_build(cls, config: Any, adapters: list[Adapter]) -> None:
        if plain := [adapter.path for adapter in adapters if not isinstance(adapter, cls)]:
            some = ", ".join(plain[:3]) + ", ..." * (len(plain) > 3)
            warnings.warn(f"use_qalora is for GPTQ layers; these have a plain LoRA: {some}.", PeftWarning)

    def build(self) -> None:
        super().build()
        self.qalora_group_size = self.config.qalora_group_size
        self.cast_to_base()
        k, there = self.base.in_features // self.qalora_group_size, {"device": self.device, "dtype": self.base.dtype}
        self.lora_A = nn.Linear(k, self.r, bias=False, **there)  # PEFT: whatever init_lora_weights is

    def branch(self, x: Tensor) -> Tensor:
        groups = self.dropped(x).unflatten(-1, (-1, self.qalora_group_size))  # (..., k, g)
        pooled = groups.mean(-1) * groups.shape[-2]  # (..., k)
        return self.scaling * self.lora_B(self.lora_A(pooled))  # (..., out)

    def delta(self) -> Tensor:
        A, B = map(self.base.matrix, (self.lora_A, self.lora_B))
        k, g = A.shape[1], self.qalora_group_size
        return (self.scaling * k / g * B @ A).repeat_interleave(g, 1)  # (out, in)
