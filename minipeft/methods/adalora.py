"""AdaLoRA - Adaptive budget allocation for LoRA. Zhang et al., 2023, https://arxiv.org/abs/2303.10512, eq. 3 and 4.

    W' = W + s B diag(E) A       A: (r, in), B: (out, r), E: (r, 1), E = 0 at the start
                                 s = alpha / r_0, r_0 the rank at the start
    loss + c mean(|A A^T - I|, |B^T B - I|)        over all A and B, in the Frobenius norm
    parameters                   init_r (in + out + 1)

While it trains, entries of E that matter little are set to 0 (adalora_budget.py); saved is what is left.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Delta
from ..base import dropout
from ..checkpoint import PREFIX, Entry, entries_of_model, strip, tuner_of
from ..config import PeftConfig
from ..errors import ConfigError, PeftError, PeftWarning, UnsupportedFeatureError
from ..layer import layers
from ..tuner import BaseTuner
from .adalora_budget import RankAllocator
from .lora import LoraConfig, LowRank

NOT_USED = ("use_rslora", "alpha_pattern", "lora_bias")


@dataclass
class AdaLoraConfig(LoraConfig, method="ADALORA"):
    """Fields of AdaLoRA beside those of LoRA, whose `r` is not used. Steps are calls of `update_and_allocate`."""

    target_r: int = 8  # mean rank in the end
    init_r: int = 12  # rank of each layer at the start
    tinit: int = 0  # steps before the first pruning
    tfinal: int = 0  # steps after the last
    deltaT: int = 1  # steps from one pruning to the next
    beta1: float = 0.85  # decay of the moving average of the importance
    beta2: float = 0.85  # and of its uncertainty
    orth_reg_weight: float = 0.5  # c
    total_step: int | None = None  # of the whole training
    rank_pattern: dict | None = None  # E by name -> which of its entries are left; found while training

    def __post_init__(self):
        super().__post_init__()
        if self.use_dora or self.loftq_config:
            raise ConfigError(f"ADALORA does not support {'DoRA' if self.use_dora else 'LoftQ'}.")
        self.require_positive("init_r", "target_r", "deltaT")
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError(f"AdaLoRA needs `total_step`, the number of training steps; got {self.total_step}.")
        if min(self.tinit, self.tfinal) < 0 or self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "Between `tinit` and `total_step - tfinal` there must be steps to prune in, and none may be negative; "
                f"got tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}."
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        if self.orth_reg_weight < 0:
            raise ConfigError(f"`orth_reg_weight` must not be negative, got {self.orth_reg_weight}.")
        idle = [name for name in NOT_USED if getattr(self, name)] + ["r"] * (self.r != 8)
        if idle:
            warnings.warn(f"AdaLoRA does not use {idle}: ignored. The rank at the start is `init_r`.", PeftWarning)


class AdaLoRA(Delta, config=AdaLoraConfig):
    prefix = "lora_"
    bases = ("Linear", "Conv1D", "Conv")
    patterns = ()

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> Any:
        if config.target_parameters:
            raise UnsupportedFeatureError("AdaLoRA adapts layers: leave `target_parameters` unset.")
        return LowRank.prepare(config, model)

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        same = {name: other for name, other in others.items() if other.peft_type == config.peft_type}
        trained = [name for name, other in same.items() if not other.inference_mode]
        if trained and not config.inference_mode:
            raise ConfigError(
                f"AdaLoRA trains one adapter at a time, and '{trained[0]}' is being trained: "
                "set inference_mode=True for all but one."
            )

    def build(self) -> None:
        c, base = self.config, self.base
        left = (c.rank_pattern or {}).get(f"{self.path}.lora_E")  # of a checkpoint
        self.r = r = c.init_r if left is None else sum(left)
        self.lora_alpha = c.lora_alpha
        self.scaling = self.initial_scaling()
        self.lora_dropout = dropout(c.lora_dropout)
        A, E, B = torch.randn(r, base.width), torch.randn(r, 1), torch.randn(base.out, r)
        torch.randn(1)  # PEFT: draws the rank before setting it
        if c.init_lora_weights:
            A, E, B = nn.init.normal_(A, std=0.02), nn.init.zeros_(E), nn.init.normal_(B, std=0.02)
        self.lora_A, self.lora_E, self.lora_B = nn.Parameter(A), nn.Parameter(E), nn.Parameter(B)
        rank = torch.full((1,), float(c.init_r), device=base.device)
        self.ranknum = nn.Parameter(rank, requires_grad=False)

    def initial_scaling(self) -> float:
        return self.lora_alpha if self.lora_alpha > 0 else float(self.config.init_r)

    @property
    def scale(self) -> Tensor:
        return self.scaling / (self.ranknum + 1e-5)  # (1,)

    def delta(self) -> Tensor:
        return (self.lora_B @ (self.lora_A * self.lora_E) * self.scale).view(self.base.shape)

    def branch(self, x: Tensor) -> Tensor:
        x = self.lora_dropout(self.cast(x, self.lora_A))
        if not self.base.pointwise:
            return super().branch(x)
        return F.linear(F.linear(x, self.lora_A * self.lora_E) * self.scale, self.lora_B)  # (..., out)

    @classmethod
    def convert_for_save(cls, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        config = cast(Any, model).peft_config[name]
        if config.rank_pattern is None:
            return tensors
        config.rank_pattern = {key.removesuffix(f".{name}"): left for key, left in config.rank_pattern.items()}
        tensors = dict(tensors)
        for key, left in config.rank_pattern.items():
            stem = next(p for p in (PREFIX, "model.", "") if p + key in tensors) + key.removesuffix("E")
            for slot, dim in (("E", 0), ("A", 0), ("B", 1)):
                if tensors[stem + slot].shape[dim] == len(left):
                    index = torch.tensor(left, device=tensors[stem + slot].device).nonzero().flatten()
                    tensors[stem + slot] = tensors[stem + slot].index_select(dim, index)
        return tensors

    @classmethod
    def resize(cls, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> Any:
        """Take the ranks of a checkpoint, which holds what pruning has left. Which entries those are is then past."""
        given = {strip(key): tensor for key, tensor in tensors.items()}
        tuner, config = cast(Any, tuner_of(model) or model), cast(Any, model).peft_config[name]
        before: list[Any] = [(config, "rank_pattern", config.rank_pattern)]
        for stem, own in _factors(model, name).items():
            adapter = cast(Any, own["E"].layer).adapters[name]
            found = {slot: given.get(strip(f"{stem}{slot}")) for slot in own}
            ranks = {None if t is None or t.dim() != 2 else t.shape[slot == "B"] for slot, t in found.items()}
            r = ranks.pop()
            if ranks or r is None or r == adapter.r or r > config.init_r:
                continue  # whatever is wrong will be said when it is loaded
            left = _pattern(config, strip(f"{stem}E"), name)
            if left is None or sum(left) != r:
                left = [index < r for index in range(config.init_r)]
            config.rank_pattern = {**(config.rank_pattern or {}), strip(f"{stem}E"): left}
            for slot, entry in own.items():
                shape = list(entry.tensor.shape)
                shape[slot == "B"] = r
                before += [(entry.tensor, field, getattr(entry.tensor, field)) for field in ("data", "grad")]
                entry.tensor.data, entry.tensor.grad = entry.tensor.new_empty(shape), None
            before.append((adapter, "r", adapter.r))
            adapter.r = r
        if len(before) > 1 and hasattr(tuner, "rankallocator"):
            ipt = tuner.rankallocator
            before += [(ipt, field, getattr(ipt, field)) for field in ("exp_avg_ipt", "exp_avg_unc")]
            ipt.reset_ipt()

        def undo() -> None:
            for owner, field, value in before:
                setattr(owner, field, value)

        return undo


def _factors(model: nn.Module, name: str) -> dict[str, dict[str, Entry]]:
    """Entries of E, A and B of each layer, by what their saved keys begin with."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries_of_model(model, name):
        stem, slot = entry.saved[:-1], entry.saved[-1]
        if stem.endswith(".lora_") and slot in "EAB":
            found.setdefault(stem, {})[slot] = entry
    return found


def _pattern(config: Any, key: str, name: str) -> list[bool] | None:
    pattern = config.rank_pattern or {}
    return pattern.get(key, pattern.get(f"{key}.{name}"))


class AdaLoraModel(BaseTuner, method="ADALORA"):
    """A model with AdaLoRA adapters. When the model's output has a `loss`, the regularisation is added to it.

    Call `update_and_allocate` in every training step; a model that gives no `loss` takes the regularisation from
    `orthogonal_regularization`.
    """

    def add(self, name: str, config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
        report = super().add(name, config, *args, **kwargs)
        if not config.inference_mode:
            self.rankallocator = RankAllocator(self.model, config, name)
        return report

    @property
    def trainable_adapter_name(self) -> str | None:
        """The adapter that is not in inference mode."""
        return next((name for name, config in self.peft_config.items() if not config.inference_mode), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), Tensor) and self.trainable_adapter_name is not None:
            outputs.loss = outputs.loss + self.orthogonal_regularization().to(outputs.loss.dtype)
        return outputs

    def orthogonal_regularization(self) -> Tensor:
        """c mean(|A A^T - I|, |B^T B - I|) of the trained adapter, a scalar to be added to the loss."""
        name = self._trained()
        adapters = [layer.adapters[name] for layer in layers(self.model) if name in layer.adapters]
        grams = [gram for a in adapters for gram in (a.lora_A @ a.lora_A.mT, a.lora_B.mT @ a.lora_B)]  # (r, r)
        norms = [torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
        return cast(Any, self.peft_config[name]).orth_reg_weight * sum(norms) / len(norms)

    def update_and_allocate(self, global_step: int) -> None:
        """Note how much each entry of E matters, and prune when it is time.

        To be called in every step, after `backward()` and before the gradients are set to zero, with the number of the
        step from 0. Raises `PeftError` when no adapter is trained, or when there are no gradients.
        """
        config: Any = self.peft_config[self._trained()]
        last = config.total_step - config.tfinal
        if global_step > last:
            self.rankallocator.mask_using_rank_pattern(config.rank_pattern)
            return
        _, pattern = self.rankallocator.update_and_allocate(global_step, force_mask=global_step == last)
        if pattern is not None:
            config.rank_pattern = pattern
        if global_step == last:
            self.rankallocator.reset_ipt()

    def _trained(self) -> str:
        if self.trainable_adapter_name is None:
            raise PeftError("No AdaLoRA adapter of this model is trained: all have inference_mode=True.")
        return self.trainable_adapter_name
