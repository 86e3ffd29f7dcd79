"""X-LoRA - Mixture of Low-Rank Adapter Experts. Buehler and Buehler, 2024, https://arxiv.org/abs/2402.07148.

    y = W x + g sum_i p_i s_i B_i A_i x     A_i: (r_i, in), B_i: (out, r_i): LoRA adapters, loaded; g: a number
    p = softmax(C(h) / T)                   (batch, length, layers, adapters): a weight of each adapter for each token
    h = the last hidden states (batch, length, hidden_size) of a first pass, in which all p are `scaling_pass_value`
    C: linear layers with ReLU between, the only part that is trained unless `use_trainable_adapters`
    parameters    (hidden_size + 1) len(adapters) in all, or (hidden_size + 1) len(adapters) with
                  layerwise_scalings=True, or (hidden_size + 1) xlora_size + (xlora_depth - 2) (xlora_size + 1)
                  xlora_size + (xlora_size + 1) len(adapters) in all with xlora_depth=4

The experts were trained before, each by itself; C learns which of them to believe at each token. The model is called
twice for each batch: first to see what h is, then with the weights that C made of it; model.py says what a model must
offer. `top_k_lora` keeps the largest p_i of each token and layer and sets the others to 0; `enable_softmax_topk` then
takes the softmax over those that are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ...core.adapter import Routed
from ...core.config import ABOVE_ZERO, Count, PeftConfig, Positive, Probability
from ...core.errors import BatchError, PeftWarning
from ...core.files import saved_at
from ..lora.lora import Factors


@dataclass
class XLoraConfig(PeftConfig, method="XLORA"):
    """Fields of X-LoRA."""

    hidden_size: Positive = None  # type: ignore[assignment]  # of the model; None: 4096
    adapters: dict[str, str] = None  # type: ignore[assignment]  # name -> folder or hub id of a saved LoRA adapter
    enable_softmax: bool = True  # False: p = C(h)
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False  # False: all layers have the same p
    xlora_depth: Count = 1  # number of linear layers of C
    xlora_size: Positive = 2048  # width between them
    xlora_dropout_p: Probability = 0.2  # between them, while training
    use_trainable_adapters: bool = False  # also train the A_i and B_i
    softmax_temperature: Annotated[float, ABOVE_ZERO] = 1.0  # T
    top_k_lora: Positive | None = None
    scaling_pass_value: float = 0.0  # p of the first pass
    global_scaling_weight: float = 1.0  # g

    def __post_init__(self):
        for name, value, shown in (("hidden_size", 4096, "4096"), ("adapters", {}, "empty")):
            if getattr(self, name) is None:
                warnings.warn(f"`{name}` was not given, so it is taken to be {shown}.", PeftWarning)
                setattr(self, name, value)
        super().__post_init__()
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("`enable_softmax_topk` is set, but `top_k_lora` is not: it keeps all.", PeftWarning)
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn("Both `enable_softmax_topk` and `enable_softmax` are set: p goes through two.", PeftWarning)

    def read_from(
        self,
        model_id: str | PathLike,
        subfolder: str | None = None,
        adapters: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Find the adapters: those saved beside this configuration, if they were trained or the named ones are gone.

        `adapters` takes the place of all that.
        """
        if adapters is not None:
            self.adapters = dict(adapters)
            return
        for number, (name, named) in enumerate(self.adapters.items()):
            if self.use_trainable_adapters or not saved_at(named, None, **options):
                inside = f"{subfolder}/{number}" if subfolder else str(number)
                self.adapters[name] = saved_at(model_id, inside, **options) or named


class XLoRA(Routed, Factors, config=XLoraConfig):
    """One of the adapters that are mixed; its own configuration is that of a LoRA."""

    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D", "Embedding")  # PEFT: also Conv2d, which sees no tokens
    shares = True  # there is a classifier beside the layers
    layer_number = 0  # of this layer, among all that have adapters
    expert = 0  # number of this adapter

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (batch, length, ..., out)
        branch = self.scaling * self.base.low_rank_forward(self.dropped(x), self.lora_A, self.lora_B)
        return (y + self.weight_for(branch) * branch).to(y.dtype)  # PEFT: a bias of B has no weight

    def weight_for(self, branch: Tensor) -> Tensor:
        """g p_i of this adapter and layer, to be multiplied with `branch` (batch, length, ..., out)."""
        now = self.layer.context.now
        if now.adapter_names is not None:
            raise BatchError("X-LoRA mixes its adapters for each token by itself; leave out `adapter_names`.")
        if now.scalings is None:
            raise BatchError(f"'{self.path}' was called by itself; X-LoRA needs a call of the whole model.")
        p = now.scalings[:, :, self.layer_number, self.expert]  # (batch, length), or (1, 1) in the first pass
        shape = tuple(branch.shape)
        fits = len(shape) > 2 and p.shape[1] in (1, shape[1]) and (len(p) == shape[0] or 1 in (len(p), shape[0]))
        if not fits:
            raise BatchError(
                f"X-LoRA gives every token a weight, so '{self.path}' should put out (batch, length, ...), with "
                f"(batch, length) as the model's hidden states have it. It puts out {shape}."
            )
        return p.reshape(*p.shape, *[1] * (len(shape) - 2))
