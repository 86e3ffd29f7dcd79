"""LoRA - Low-Rank Adaptation. Hu et al., 2021, https://arxiv.org/abs/2106.09685, eq. 3.

    W' = W + s B A               A: (r, in), B: (out, r), B = 0 at the start
                                 s = alpha / r, or alpha / sqrt(r): rsLoRA, https://arxiv.org/abs/2312.03732
    parameters                   r (in + out), or r (in + out) + out with lora_bias=True
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Delta
from ..base import dropout
from ..checkpoint import read_weights
from ..errors import ConfigError, UnsupportedFeatureError
from ..replicate import replicate_layers
from ..targets import pattern_value
from .lora_configs import LoraConfig as LoraConfig
from .lora_init import changes_base, initialise, to_plain
from .lora_model import LoraModel as LoraModel


class Factors(Adapter):
    """The factors A and B."""

    prefix = "lora_"
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D", "Conv", "Embedding", "Attention", "Param")

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> Any:
        later = ["megatron_config", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config"]
        later += ["use_bdlora", "arrow_config", "kasa_config"]
        for name in later:
            if getattr(config, name):
                raise UnsupportedFeatureError(f"minipeft does not do LoRA with `{name}` yet; leave it, or use peft.")
        return replicate_layers(model, config.layer_replication) if config.layer_replication else None

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        for name, other in others.items():
            if config.layer_replication and config.layer_replication != getattr(other, "layer_replication", None):
                raise ConfigError(f"layer_replication rebuilds the model; it cannot be used beside adapter '{name}'.")
            mine, theirs = set(config.target_parameters or ()), set(getattr(other, "target_parameters", None) or ())
            if mine and theirs and mine != theirs:
                has = f"'{name}' has {sorted(theirs)}, not {sorted(mine)}"
                raise ConfigError(f"All adapters must target the same parameters, but {has}.")

    def build(self) -> None:
        c = self.config
        self.r = pattern_value(c.rank_pattern, self.path, c.r)
        self.lora_alpha = pattern_value(c.alpha_pattern, self.path, c.lora_alpha)
        self.use_rslora, self.use_dora, self.lora_bias = c.use_rslora, c.use_dora, c.lora_bias
        self.scaling = self.initial_scaling()
        self.lora_dropout = dropout(c.lora_dropout)
        self.lora_A = self.base.down(self.r)  # (r, in)
        self.lora_B = self.base.up(self.r, c.lora_bias)  # (out, r)
        if not self.blank or self.changes_base(c):
            initialise(self, c.init_lora_weights)

    def initial_scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.config.use_rslora else self.r)

    def trains(self, slot: str) -> bool:
        return not (self.config.init_lora_weights == "mica" and slot.endswith("_B"))

    def dropped(self, x: Tensor) -> Tensor:
        """The input of A: with dropout while training, in A's dtype. Indices stay as they are."""
        if not self.base.reads_vectors:
            return x
        x, drop = self.cast(x, self.lora_A.weight), self.lora_dropout
        return x if type(drop) is nn.Identity else drop(x)

    def delta(self) -> Tensor:
        return self.base.product(self.lora_A, self.lora_B, self.scaling)  # (out, in)


class LowRank(Factors, Delta):
    """What LoRA and DoRA share: they change W by way of the factors."""

    @classmethod
    def convert_to_plain(cls, config: Any, tensors: dict[str, Tensor], initial: Any) -> tuple[Any, dict[str, Tensor]]:
        return to_plain(config, tensors, read_weights(initial))

    @classmethod
    def changes_base(cls, config: Any) -> bool:
        return changes_base(config.init_lora_weights)


class LoRA(LowRank, config=LoraConfig):
    @classmethod
    def chosen_by(cls, config: Any) -> bool:
        return not config.use_dora

    def follow(self, source: Any, fresh: bool = False) -> None:
        A, B = source.lora_A, source.lora_B  # (r, tokens), (dim, r)
        if not self.base.reads_vectors:
            self.lora_A.data, self.lora_B.data = A.data, B.data
            return
        a, b = self.lora_A.weight, self.lora_B.weight  # a head: (s B A)^T = s A^T B^T
        if fresh:
            if isinstance(self.config.init_lora_weights, str) and self.config.init_lora_weights != "gaussian":
                raise ConfigError(f"init_lora_weights={self.config.init_lora_weights!r} is not for tied embeddings.")
            if self.config.init_lora_weights:  # PEFT: those of the head, in the order in which memory holds them
                if a.shape == B.shape[::-1]:
                    B.data = a.data.reshape(B.shape).clone()
                nn.init.zeros_(A)
        self.r, self.lora_alpha, self.scaling = source.r, source.lora_alpha, source.scaling
        for mine, theirs in ((a, B), (b, A)):
            if mine.data_ptr() != theirs.data_ptr() or mine.shape != theirs.shape[::-1]:
                mine.data = theirs.data.t()

    def agrees(self, source: Any) -> bool:
        if not self.base.reads_vectors:
            return super().agrees(source)
        a, b = self.lora_A.weight, self.lora_B.weight
        return torch.equal(a, source.lora_B.t()) and torch.equal(b, source.lora_A.t())

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (..., out)
        return self.base.add_through(y, self.dropped(x), self.lora_A, self.lora_B, self.scaling).to(y.dtype)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self.lora_B, "bias", None)
        if bias is not None:
            b = self.scaling * bias + (0 if b is None else b)
        return W + self.delta(), b

    @property
    def folds_in_place(self) -> bool:
        return self.base.overwrites and self.lora_B.bias is None

    def fold_in_place(self, W: Tensor) -> None:
        A, B = self.lora_A.weight, self.lora_B.weight
        W.addmm_(B.to(W.dtype), A.to(W.dtype), alpha=self.scaling)
