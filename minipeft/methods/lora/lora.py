"""LoRA - Low-Rank Adaptation. Hu et al., 2021, https://arxiv.org/abs/2106.09685, eq. 3.

    W' = W + s B A               A: (r, in), B: (out, r), B = 0 at the start
                                 s = alpha / r, or alpha / sqrt(r): rsLoRA, https://arxiv.org/abs/2312.03732
    parameters                   r (in + out), or r (in + out) + out with lora_bias=True

A takes the input down to r numbers, B takes these up to the output: whatever is learned, dW has at most rank r. As B is
0 at the start, the model begins as it was; A is random then, or B would have no gradient (`init_lora_weights` has other
starts). s is a constant, no part of what is trained: it sets how far a step of the optimizer moves W.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Delta, Parts, variants
from ...core.bases import Param, dropout, has_hooks, weight_of
from ...core.errors import ConfigError, PeftWarning, UnsupportedFeatureError
from ...core.state import read_weights
from ...core.targets import pattern_value
from .configs import LoraConfig as LoraConfig
from .initial import changes_base, initialise, to_plain
from .padding import refit
from .replicate import replicate_layers


def scale(r: int, alpha: float, stabilised: bool) -> float:
    """alpha / r; `stabilised` (rsLoRA): alpha / sqrt(r)."""
    return alpha / (math.sqrt(r) if stabilised else r)


class Factors(Adapter):
    """The factors A and B."""

    prefix = "lora_"
    embedding_slots = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D", "Conv", "Embedding", "Attention", "Param")
    # of hot swapping
    can_pad: ClassVar[bool] = True  # False: its rank cannot be raised by zeros behind its factors
    fades: ClassVar[bool] = True  # False: with all of its tensors 0 it still changes the layer
    residual: Tensor | None = None  # the frozen weight as it will be once the adapter is accepted
    padded: Mapping[str, Any] = {}  # slots with zeros behind their factor, and its shape without those

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> Any:
        asked = variants(config)
        if len(several := asked + ["init_lora_weights='mica'"] * (config.init_lora_weights == "mica")) > 1:
            raise ConfigError(f"An adapter can be one variant of LoRA, not {' and '.join(several)} at once.")
        if config.megatron_config:
            raise UnsupportedFeatureError("minipeft does not adapt Megatron's layers: leave `megatron_config` out.")
        return replicate_layers(model, config.layer_replication) if config.layer_replication else None

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        super().check_beside(config, others)
        starts = dict.fromkeys(getattr(c, "init_lora_weights", True) for c in (config, *others.values()) if others)
        if changing := [start for start in starts if changes_base(start)]:
            what = "changes the base weights of the model, also for the adapters beside it"
            warnings.warn(f"init_lora_weights={changing[0]!r} {what}.", PeftWarning)
        mine = set(config.target_parameters or ())
        for name, other in others.items() if mine or config.layer_replication else ():
            if config.layer_replication and config.layer_replication != getattr(other, "layer_replication", None):
                raise ConfigError(f"layer_replication rebuilds the model; it cannot be used beside adapter '{name}'.")
            theirs = set(getattr(other, "target_parameters", None) or ())
            if mine and theirs and mine != theirs:
                has = f"'{name}' has {sorted(theirs)}, not {sorted(mine)}"
                raise ConfigError(f"All adapters must target the same parameters, but {has}.")

    @classmethod
    def convert_for_save(cls, config: Any, name: str, tensors: dict[str, Tensor], entries: Any) -> dict[str, Tensor]:
        refit(entries, name, tensors, zeros=False)
        return tensors

    @classmethod
    def resize(cls, model: Any, name: str, tensors: dict[str, Tensor], entries: Any) -> None:
        refit(entries, name, tensors, zeros=True)

    def build(self) -> None:
        c = self.config
        r = pattern_value(c.rank_pattern, self.path, c.r)
        alpha = pattern_value(c.alpha_pattern, self.path, c.lora_alpha)
        flags = {"use_rslora": c.use_rslora, "use_dora": c.use_dora, "lora_bias": c.lora_bias}
        self.put_values(r=r, lora_alpha=alpha, **flags)
        self.scaling = self.initial_scaling()
        self.lora_dropout = dropout(c.lora_dropout)
        self.lora_A, self.lora_B = self.base.factors(r, c.lora_bias)  # (r, in), (out, r)
        initialise(self, c.init_lora_weights)

    @classmethod
    def after_build(cls, config: Any, adapters: list[Any]) -> None:
        bare = [adapter for adapter in adapters if config.lora_bias and adapter.base.stored()[1] is None]
        if bare:
            has = f"a layer that has no bias, such as '{bare[0].path}' ({bare[0].base.label}), cannot have it merged"
            warnings.warn(f"`lora_bias=True` was passed, but {has}.", PeftWarning)
        read = [a.path for a in adapters if a.base.needs_weights] if config.lora_dropout else []
        if read:  # PEFT: without a word
            warnings.warn(f"`lora_dropout` has no effect on '{read[0]}', which is reached by its weights.", PeftWarning)

    def initial_scaling(self) -> float:
        return scale(self.r, self.lora_alpha, self.config.use_rslora)

    @property
    def sums(self) -> tuple[int, ...] | None:
        """What adapters have in common that add up: the tokens after which they act. None: these do not add up."""
        return None

    def is_trainable(self, slot: str) -> bool:
        return not (self.config.init_lora_weights == "mica" and slot.endswith("_B"))

    def dropped(self, x: Tensor) -> Tensor:
        """The input of A: with dropout while training, in A's dtype. Indices stay as they are."""
        return self.lora_dropout(self.cast(x, self.lora_A.weight)) if self.base.reads_vectors else x

    def delta(self) -> Tensor:
        return self.base.low_rank_delta(self.lora_A, self.lora_B, self.scaling)  # (out, in)

    def fold_bias(self, b: Tensor | None) -> Tensor | None:
        """b plus the bias of B, if that has one."""
        bias = getattr(self.lora_B, "bias", None)
        return b if bias is None else self.scaling * bias + (0 if b is None else b)


class LowRank(Factors, Delta):
    """What LoRA and DoRA share: they change W by way of the factors."""

    @classmethod
    def convert_to_plain(cls, config: Any, tensors: dict[str, Tensor], initial: Any) -> tuple[Any, dict[str, Tensor]]:
        return to_plain(config, tensors, read_weights(initial))

    @classmethod
    def changes_base(cls, config: Any) -> bool:
        return changes_base(config.init_lora_weights)


class Summed(LowRank):
    """What LoRA shares with variants that are merged as it is: W' = W + s B A."""

    @property
    def sums(self) -> tuple[int, ...] | None:
        return ()

    def in_parts(self, b: Tensor | None) -> Parts:
        A, B, s = self.base.matrix(self.lora_A), self.base.matrix(self.lora_B), self.scaling
        fold = lambda W, rows: W.addmm_(B[rows].to(W.dtype), A.to(W.dtype), alpha=s)
        return Parts(fold, self.fold_bias(b))


class LoRA(Summed, config=LoraConfig):
    @classmethod
    def check_layer(cls, config: Any, path: str, base: Any) -> None:
        given = [field for field in ("lora_dropout", "lora_bias", "fan_in_fan_out") if getattr(config, field)]
        if given and isinstance(base, Param):
            laid_out = "`is_transposed` of their module says how they are laid out"
            why = laid_out if given[0] == "fan_in_fan_out" else "A never sees the input"
            raise ConfigError(f"`{given[0]}` is not for bare parameters such as '{path}': {why}.")

    def tie_to(self, source: Any, fresh: bool = False) -> None:
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

    def matches(self, source: Any) -> bool:
        if not self.base.reads_vectors:
            return super().matches(source)
        return torch.equal(self.lora_A.weight, source.lora_B.t()) and torch.equal(self.lora_B.weight, source.lora_A.t())

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (..., out)
        added = self.base.add_low_rank(y, self.dropped(x), self.lora_A, self.lora_B, self.scaling)
        return added if added.dtype == y.dtype else added.to(y.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor, Any] | None:
        A, B = self.lora_A, self.lora_B
        if not (type(A) is type(B) is nn.Linear) or has_hooks(A) or has_hooks(B) or B._parameters["bias"] is not None:
            return None
        if self.layer.training and isinstance(self.lora_dropout, nn.Dropout):
            return None
        return weight_of(A), weight_of(B), self.scaling
