"""VB-LoRA - low-rank factors out of one bank of vectors. Li et al., 2024, https://arxiv.org/abs/2405.15179, eq. 3.3.

    W' = W + B A        each piece of b entries of a row of A, or of a column of B, is  sum_k softmax(l_k) v_k
                        over the k with the `topk` largest of the piece's logits l
    parameters          num_vectors r (in + out) / vector_length, and num_vectors vector_length in all

    bank v: (h, b), shared by all layers; logits of A: (r, in / b, h), of B: (out / b, r, h), normal at the start

The vectors are the same for the whole model, and a layer only says which of them make up its A and B. Most of what is
trained are the logits, h for each piece; a checkpoint can do with the `topk` that were chosen
(`save_only_topk_weights`). Neither factor starts at 0, so the model does not begin quite as it was, but near: entries
of dW are below r bound^2, with the bank's `init_vector_bank_bound`. So small a bank also learns slowly at first; small
models take a larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Factored
from ..core.bases import Base, dropout
from ..core.config import AT_LEAST_ZERO, PeftConfig, Positive, Probability, Size
from ..core.errors import ConfigError
from .vblora_topk import BANK, LOGITS, compressed, expanded


@dataclass
class VBLoRAConfig(PeftConfig, method="VBLORA"):
    """Fields of VB-LoRA. `vector_length` must divide the layers' sizes."""

    r: Positive = 4  # rank
    num_vectors: Size = 256  # h
    vector_length: Size = 256  # b
    topk: Positive = 2  # vectors mixed into one piece
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    save_only_topk_weights: bool = False  # a smaller checkpoint, for use without further training
    vblora_dropout: Probability = 0.0  # on the input of A, while training
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: Annotated[float, AT_LEAST_ZERO] = 0.02  # the bank is drawn from [-bound, bound]
    init_logits_std: Annotated[float, AT_LEAST_ZERO] = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ConfigError(f"`topk` is {self.topk}, but the bank has only num_vectors={self.num_vectors} vectors.")


class VBLoRA(Factored, config=VBLoRAConfig):
    prefix = "vblora_"
    shares = True

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        base.require_divisible(config.vector_length, "vector_length", path)

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        return {BANK: nn.Parameter(torch.zeros(config.num_vectors, config.vector_length))}

    @classmethod
    def convert_for_save(cls, config: Any, name: str, tensors: dict[str, Tensor], entries: Any) -> dict[str, Tensor]:
        return compressed(config, tensors) if config.save_only_topk_weights else tensors

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return expanded(config, tensors) if config.save_only_topk_weights else tensors

    def build(self) -> None:
        c, b = self.config, self.config.vector_length
        self.r, self.topk = c.r, c.topk
        self.vblora_dropout = dropout(c.vblora_dropout)
        if not self.base.on_meta:  # PEFT: the bank is drawn anew for each layer, and the last one counts
            bound = c.init_vector_bank_bound
            self.vblora_vector_bank.data = torch.empty(c.num_vectors, b).uniform_(-bound, bound)
        for slot, shape in (("A", (c.r, self.base.in_features // b)), ("B", (self.base.out_features // b, c.r))):
            logits = torch.empty(*shape, c.num_vectors).normal_(0, c.init_logits_std)
            setattr(self, LOGITS + slot, nn.Parameter(logits))

    def pieces(self, logits: Tensor) -> Tensor:
        """What each of the logits (..., h) chooses from the bank: (..., b)."""
        top, indices = logits.topk(self.topk)
        return (top.softmax(-1)[..., None] * self.vblora_vector_bank[indices]).sum(-2)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.pieces(self.vblora_logits_A), self.pieces(self.vblora_logits_B)  # (r, in / b, b), (out / b, r, b)
        return B.transpose(1, 2).flatten(0, 1), A.flatten(1)
