"""VB-LoRA - low-rank factors out of one bank of vectors. Li et al., 2024, https://arxiv.org/abs/2405.15179, eq. 3.

    W' = W + B A        each piece of b entries of a row of A, or of a column of B, is  sum_k softmax(l_k) v_k
                        over the k with the `topk` largest of the piece's logits l
    parameters          num_vectors r (in + out) / vector_length, and num_vectors vector_length in all

    bank v: (h, b), shared by all layers; logits of A: (r, in / b, h), of B: (out / b, r, h), normal at the start
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Delta
from ..base import Base
from ..config import PeftConfig, Probability
from ..errors import ConfigError
from ..tuner import BaseTuner

BANK, LOGITS = "vblora_vector_bank", "vblora_logits_"
INDEX_DTYPES = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}  # and the bank sizes they are for


@dataclass
class VBLoRAConfig(PeftConfig, method="VBLORA"):
    """Fields of VB-LoRA. `vector_length` must divide the layers' sizes."""

    r: int = 4  # rank
    num_vectors: int = 256  # h
    vector_length: int = 256  # b
    topk: int = 2  # vectors mixed into one piece
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    save_only_topk_weights: bool = False  # a smaller checkpoint, for use without further training
    vblora_dropout: Probability = 0.0  # on the input of A, while training
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02  # the bank is drawn from [-bound, bound]
    init_logits_std: float = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        for field in ("r", "num_vectors", "vector_length", "topk"):
            self.require_positive(field)
        if self.topk > self.num_vectors:
            raise ConfigError(f"`topk` is {self.topk}, but the bank has only num_vectors={self.num_vectors} vectors.")

    @property
    def index_dtype(self) -> torch.dtype:
        """The smallest dtype that PEFT takes for an index into the bank."""
        return next((dtype for dtype, size in INDEX_DTYPES.items() if self.num_vectors < size), torch.int64)


class VBLoRA(Delta, config=VBLoRAConfig):
    prefix = "vblora_"
    shares = True

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        base.require_divisible(config.vector_length, "vector_length", path)

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        return {BANK: nn.Parameter(torch.zeros(config.num_vectors, config.vector_length))}

    @classmethod
    def convert_for_save(cls, model: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        config = model.peft_config[name]
        if not config.save_only_topk_weights:
            return tensors
        saved = {}
        for key, tensor in tensors.items():
            if LOGITS in key:
                top, indices = tensor.topk(config.topk)
                saved[f"{key}_topk_indices"] = indices.to(config.index_dtype)
                saved[f"{key}_topk_weights"] = top.softmax(-1)[..., :-1].contiguous()  # they add up to 1
            else:
                saved[key] = tensor
        return saved

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(tensors)
        for key in [key for key in tensors if key.endswith("_topk_indices") and config.save_only_topk_weights]:
            whole = key.removesuffix("_topk_indices")
            if (weights := tensors.pop(f"{whole}_topk_weights", None)) is not None:
                weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
                logits = weights.new_full((*weights.shape[:-1], config.num_vectors), -torch.inf)
                tensors[whole] = logits.scatter(-1, tensors.pop(key).long(), weights.log())
        return tensors

    def build(self) -> None:
        c, b = self.config, self.config.vector_length
        self.r, self.topk = c.r, c.topk
        self.vblora_dropout = nn.Dropout(c.vblora_dropout) if c.vblora_dropout else nn.Identity()
        if not self.blank:  # PEFT: the bank is drawn anew for each layer, and the last one counts
            bound = c.init_vector_bank_bound
            self.vblora_vector_bank.data = torch.empty(c.num_vectors, b).uniform_(-bound, bound)
        for slot, shape in (("A", (c.r, self.base.inp // b)), ("B", (self.base.out // b, c.r))):
            logits = torch.empty(*shape, c.num_vectors).normal_(0, c.init_logits_std)
            setattr(self, LOGITS + slot, nn.Parameter(logits))

    def pieces(self, logits: Tensor) -> Tensor:
        """What each of the logits (..., h) chooses from the bank: (..., b)."""
        top, indices = logits.topk(self.topk)
        return (top.softmax(-1)[..., None] * self.vblora_vector_bank[indices]).sum(-2)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in)."""
        A, B = self.pieces(self.vblora_logits_A), self.pieces(self.vblora_logits_B)  # (r, in / b, b), (out / b, r, b)
        return B.transpose(1, 2).flatten(0, 1), A.flatten(1)

    def delta(self) -> Tensor:
        B, A = self.factors
        return B @ A  # (out, in)

    def branch(self, x: Tensor) -> Tensor:
        B, A = self.factors
        return F.linear(F.linear(self.vblora_dropout(self.cast(x, A)), A), B)  # (..., out)


class VBLoRAModel(BaseTuner, method="VBLORA"):
    """A model with VB-LoRA adapters."""

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """(VB-LoRA's, other) numbers in a checkpoint of `adapter`, counted in units of four bytes."""
        config: Any = self.peft_config[adapter]
        logits = bank = other = 0
        for name, p in self.named_parameters():
            logits += p.numel() * (LOGITS in name)
            bank += p.numel() * (BANK in name)
            other += p.numel() * (LOGITS not in name and BANK not in name and p.requires_grad)
        if not config.save_only_topk_weights:
            return bank + logits, other
        pieces = logits / config.num_vectors
        return int(bank + pieces * (config.topk - 1 + config.topk * config.index_dtype.itemsize / 4)), other

    def print_savable_parameters(self) -> None:
        """Print these numbers of the default adapter."""
        own, other = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} "
            f"|| total params to-be-saved: {own + other:,d}"
        )
