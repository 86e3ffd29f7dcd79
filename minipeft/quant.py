"""Quantised layers as operators. Their libraries are found through sys.modules, so none is ever imported here.

    bitsandbytes.nn.Linear4bit      NF4 and FP4
    bitsandbytes.nn.Linear8bitLt    LLM.int8()
    gptqmodel's linear layers       GPTQ, where they can be dequantised; nothing is written to them

Reading dequantises; writing quantises anew, from float32 and with the layer's own settings. A merge is undone by
putting the old quantised weight back, so no bit changes. Adapter tensors on these layers are float32.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base, Linear
from .errors import MergeError
from .stored import fingerprint, put


def quantised(module: nn.Module) -> type[Base] | None:
    """The kind of base for a quantised layer, or None when it is not one."""
    bnb, gptq = sys.modules.get("bitsandbytes"), sys.modules.get("gptqmodel.nn_modules.qlinear")
    if bnb is not None and isinstance(module, bnb.nn.Linear4bit):
        return Linear4bit
    if bnb is not None and isinstance(module, bnb.nn.Linear8bitLt):
        return Linear8bitLt
    if gptq is not None and isinstance(module, gptq.BaseQuantLinear):
        methods = [getattr(method, "value", method) for method in module.SUPPORTS_METHODS or ()]
        return GPTQ if "gptq" in methods and hasattr(module, "dequantize_weight") else None
    return None


def backend_name(module: nn.Module) -> str | None:
    """The name that `get_layer_status` reports for a layer's quantisation."""
    kind = quantised(module)
    names = {"Linear4bit": "bnb 4bit", "Linear8bitLt": "bnb 8bit", "GPTQ": "gptq"}
    return None if kind is None else names[kind.__name__]


class _Quantised(Linear):
    """A linear layer whose stored weight is not the matrix it stands for."""

    leaf: Any

    @property
    def dtype(self) -> torch.dtype:
        weight = self.leaf.weight  # not moved to a device yet, it is still in full precision
        return weight.dtype if weight.dtype.is_floating_point else torch.float32

    def read(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.originals()
        return self.dequantise(weight), bias

    def held(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.stored()
        return self.dequantise(weight), bias

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """As on other layers, but that the stored weight is a new one, and the old one itself is kept."""
        self.check_bias(b)
        weight, W = self.stored()[0], W.detach().contiguous()
        if weight.dtype.is_floating_point:
            new = nn.Parameter(W.to(weight.dtype), requires_grad=False)
        else:
            new = self.quantise(W, self.originals()[0])
        values = {"bias": b} if b is not None and self.replaces_bias(b) else {}
        self.detach(weight)
        kept = self.keep(dict.fromkeys(values, self.leaf.bias))
        if "weight" not in kept:
            kept.add("weight", weight)
        self.attach(new)
        for value in values.values():
            put(self.leaf.bias, value)
        self.note_written()

    def restore(self) -> None:
        if (kept := self.home.kept) is not None:
            self.attach(kept["weight"])
            if "bias" in kept:
                put(self.leaf.bias, kept["bias"])
        self.release()

    def fingerprints(self) -> dict[str, Any]:
        return {"bias": fingerprint(self.leaf.bias)} if self.keeps("bias") else {}  # running may repack the weight

    def attach(self, weight: Any) -> None:
        """Make `weight` the stored weight."""
        self.leaf.weight = weight

    def detach(self, weight: Any) -> None:
        """Let the stored weight take along what the layer keeps for it."""

    def dequantise(self, weight: Any) -> Tensor:
        """The matrix (out, in) that a stored weight stands for."""
        raise NotImplementedError

    def quantise(self, W: Tensor, like: Any) -> Any:
        """A stored weight for the matrix W (out, in), with the settings of `like`."""
        raise NotImplementedError


class Linear4bit(_Quantised):
    """bitsandbytes' 4-bit layer."""

    def dequantise(self, weight: Any) -> Tensor:
        state = getattr(weight, "quant_state", None)
        if state is None:
            return weight.data
        functional, data = sys.modules["bitsandbytes"].functional, weight.data
        if getattr(state, "packing_format_for_cpu", False):  # running it on a CPU with AVX512-BF16 has repacked it
            absmax = state.absmax.T.reshape(-1).float()
            state = copy.copy(state)
            state.original_nested = False  # `absmax` is not quantised in the packed form
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
            state.absmax = absmax
        return functional.dequantize_4bit(data, state)

    def quantise(self, W: Tensor, like: Any) -> Any:
        settings = {
            name: getattr(like, name) for name in ("quant_type", "compress_statistics", "blocksize", "quant_storage")
        }
        new = type(like)(W.float().cpu(), requires_grad=False, module=self.leaf, **settings).to(like.device)
        new.quant_state.dtype = getattr(like.quant_state, "original_dtype", like.quant_state.dtype)
        return new

    def attach(self, weight: Any) -> None:
        super().attach(weight)
        self.leaf.quant_state = getattr(weight, "quant_state", None)


class Linear8bitLt(_Quantised):
    """bitsandbytes' 8-bit layer."""

    def dequantise(self, weight: Any) -> Tensor:
        if weight.dtype.is_floating_point:
            return weight.data
        scale = weight.SCB if weight.SCB is not None else self.leaf.state.SCB  # running moves it to the state
        return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(weight.data, scale)

    def quantise(self, W: Tensor, like: Any) -> Any:
        settings = {"requires_grad": False, "has_fp16_weights": like.has_fp16_weights}
        return type(like)(W.cpu(), **settings).to(like.device)

    def attach(self, weight: Any) -> None:
        super().attach(weight)
        self.leaf.state.reset_grads()  # so that running takes the scale from the weight

    def detach(self, weight: Any) -> None:
        if getattr(weight, "SCB", None) is None and self.leaf.state.SCB is not None:
            weight.CB, weight.SCB = weight.data, self.leaf.state.SCB


class GPTQ(_Quantised):
    """A linear layer of gptqmodel: integers, with a scale and a zero for each group of inputs."""

    label = "GPTQLoraLinear"
    weight_name = "qweight"

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(getattr(self.leaf, "weight", None), "dtype", torch.int32)  # that of what is dequantised
        return dtype if dtype.is_floating_point else torch.float32

    def dequantise(self, weight: Any) -> Tensor:
        return self.leaf.dequantize_weight().t()  # (out, in)

    def write(self, W: Tensor, b: Tensor | None) -> None:
        raise MergeError("Adapters cannot be merged into GPTQ layers: quantising anew needs the data it was fitted to.")
