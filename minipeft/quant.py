"""Quantised layers as operators. Their libraries are found through sys.modules, so none is ever imported here.

    bitsandbytes.nn.Linear4bit      NF4 and FP4
    bitsandbytes.nn.Linear8bitLt    LLM.int8()

Reading dequantises; writing quantises anew with the layer's own settings, and a merge is undone by putting the old
quantised weight back, so no bit changes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base, Linear
from .errors import MergeError


def quantised(module: nn.Module) -> type[Base] | None:
    """The kind of base for a quantised layer, or None when it is not one."""
    bnb = sys.modules.get("bitsandbytes")
    if bnb is None:
        return None
    if isinstance(module, bnb.nn.Linear4bit):
        return Linear4bit
    if isinstance(module, bnb.nn.Linear8bitLt):
        return Linear8bitLt
    return None


def backend_name(module: nn.Module) -> str | None:
    """The name that `get_layer_status` reports for a layer's quantisation."""
    kind = quantised(module)
    return None if kind is None else {"Linear4bit": "bnb_4bit", "Linear8bitLt": "bnb_8bit"}[kind.__name__]


class _Quantised(Linear):
    """A linear layer whose stored weight is not the matrix it stands for."""

    def read(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.home.original or self.stored()
        return self.dequantise(weight), bias

    def write(self, W: Tensor, b: Tensor | None) -> None:
        weight, bias = self.stored()
        if b is not None and bias is None:
            raise MergeError("The adapter gives the quantised layer a bias, but it has none to write it to.")
        if self.home.original is None:
            self.home.original = weight, None if bias is None else bias.data
        self.leaf.weight = self.quantise(W, weight)
        if bias is not None and b is not None:
            bias.data = b.to(bias.dtype)

    def restore(self) -> None:
        if self.home.original is not None:
            self.leaf.weight, bias = self.home.original
            if bias is not None:
                self.leaf.bias.data = bias
            self.home.original = None

    def dequantise(self, weight: Any) -> Tensor:
        """The matrix (out, in) that a stored weight stands for."""
        raise NotImplementedError

    def quantise(self, W: Tensor, like: Any) -> Any:
        """A stored weight for the matrix W (out, in), with the settings of `like`."""
        raise NotImplementedError


class Linear4bit(_Quantised):
    """bitsandbytes' 4-bit layer."""

    @property
    def dtype(self) -> torch.dtype:
        return self.leaf.compute_dtype or torch.float32

    def dequantise(self, weight: Any) -> Tensor:
        if weight.quant_state is None:  # not moved to a device yet, so still in full precision
            return weight.data
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)

    def quantise(self, W: Tensor, like: Any) -> Any:
        state = like.quant_state
        settings = dict(
            requires_grad=False,
            quant_type=like.quant_type,
            compress_statistics=like.compress_statistics,
            blocksize=like.blocksize,
            quant_storage=like.quant_storage,
            module=self.leaf,
        )
        W = W.detach().to(state.dtype if state is not None else like.dtype).cpu()
        return type(like)(W.contiguous(), **settings).to(like.device)


class Linear8bitLt(_Quantised):
    """bitsandbytes' 8-bit layer."""

    @property
    def dtype(self) -> torch.dtype:
        weight = self.leaf.weight
        return weight.dtype if weight.dtype.is_floating_point else torch.float16 if weight.is_cuda else torch.float32

    def dequantise(self, weight: Any) -> Tensor:
        if weight.dtype.is_floating_point:
            return weight.data
        scale = weight.SCB if weight.SCB is not None else self.leaf.state.SCB
        return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(weight.data, scale)

    def quantise(self, W: Tensor, like: Any) -> Any:
        self.leaf.state.reset_grads()
        self.leaf.state.CB = self.leaf.state.SCB = None
        settings = dict(requires_grad=False, has_fp16_weights=like.has_fp16_weights)
        return type(like)(W.detach().to(torch.float16).cpu().contiguous(), **settings).to(like.device)

    def restore(self) -> None:
        if self.home.original is not None:
            self.leaf.state.CB = self.leaf.state.SCB = None
        super().restore()
