"""Quantised layers as operators. Their libraries are found through sys.modules, so none is ever imported here.

    bitsandbytes.nn.Linear4bit      NF4 and FP4
    bitsandbytes.nn.Linear8bitLt    LLM.int8()
    torchao's weights of nn.Linear  where they can be dequantised; only int8 weights are written
    gptqmodel's linear layers       GPTQ, where they can be dequantised; nothing is written to them

Reading dequantises; writing quantises anew, from float32 and with the layer's own settings. A merge is undone by
putting the old quantised weight back, so no bit changes. The dtype of a stored weight says nothing of whether it is
quantised: packed 4-bit numbers may be stored as bfloat16 (`bnb_4bit_quant_storage`), and torchao's weights give the
dtype that they stand for. As in PEFT, adapter tensors take that of torchao's weights, `compute_dtype` of 4-bit ones,
and else float32.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .bases import Base, Linear
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
    ao, weight = sys.modules.get("torchao.utils"), module._parameters.get("weight")
    if ao is not None and isinstance(weight, ao.TorchAOBaseTensor):
        readable = type(weight).dequantize not in (Tensor.dequantize, ao.TorchAOBaseTensor.dequantize)
        return TorchAO if readable and isinstance(module, nn.Linear) else Unreadable
    return None


def backend_name(module: nn.Module) -> str | None:
    """The name that `get_layer_status` reports for a layer's quantisation."""
    kind = quantised(module)
    names = {"Linear4bit": "bnb 4bit", "Linear8bitLt": "bnb 8bit", "GPTQ": "gptq", "TorchAO": "torchao"}
    return None if kind is None else names.get(kind.__name__)


class _Quantised(Linear):
    """A linear layer whose stored weight is not the matrix it stands for."""

    leaf: Any

    @property
    def packed(self) -> bool:
        return True

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.leaf.weight.dtype
        return dtype if dtype.is_floating_point else torch.float32

    def read(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.originals()
        return self.dequantise(weight), bias

    def current(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.stored()
        return self.dequantise(weight), bias

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """As on other layers, but that the stored weight is a new one, and the old one itself is kept."""
        self.check_writes()
        weight, values = self.stored()[0], {"bias": b} if b is not None and self.takes_bias(b) else {}
        self.detach(weight)
        new = self.quantise(W.detach().contiguous(), self.originals()[0])
        backup = self.back_up(dict.fromkeys(values, self.leaf.bias))
        if "weight" not in backup:
            backup.add("weight", weight)
        self.attach(new)
        for value in values.values():
            put(self.leaf.bias, value)
        self.note_written()

    def restore(self) -> None:
        if (backup := self.innermost.backup) is not None:
            self.attach(backup["weight"])
            if "bias" in backup:
                put(self.leaf.bias, backup["bias"])
        self.release()

    def fingerprints(self) -> dict[str, Any]:
        return {"bias": fingerprint(self.leaf.bias)} if self.has_backup("bias") else {}  # running may repack the weight

    def attach(self, weight: Any) -> None:
        """Make `weight` the stored weight."""
        self.leaf.weight = weight

    def detach(self, weight: Any) -> None:
        """Let the stored weight take along what the layer keeps for it."""

    def dequantise(self, weight: Any) -> Tensor:
        """The matrix (out, in) that a stored weight stands for."""
        raise NotImplementedError

    def quantise(self, W: Tensor, like: Any) -> Any:
        """A stored weight for the matrix W (out, in), with the settings of `like`; not quantised if that is not yet."""
        raise NotImplementedError


class Linear4bit(_Quantised):
    """bitsandbytes' 4-bit layer. Moving it to a device quantises its weight, which then has a quant_state."""

    @property
    def dtype(self) -> torch.dtype:
        return self.leaf.compute_dtype or torch.float32

    @property
    def packed(self) -> bool:
        return self.state(self.leaf.weight) is not None

    def state(self, weight: Any) -> Any:
        """How the numbers of a stored weight are to be read; None when they are the matrix itself."""
        state = getattr(weight, "quant_state", None)
        return self.leaf.quant_state if state is None and weight is self.leaf.weight else state

    def dequantise(self, weight: Any) -> Tensor:
        if (state := self.state(weight)) is None:
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
        make, state = sys.modules["bitsandbytes"].nn.Params4bit, self.state(like)
        if state is None:
            return make(W.to(like.device, like.dtype), requires_grad=False, module=self.leaf, **settings)
        new = make(W.float().cpu(), requires_grad=False, module=self.leaf, **settings).to(like.device)
        new.quant_state.dtype = getattr(state, "original_dtype", state.dtype)
        return new

    def attach(self, weight: Any) -> None:
        super().attach(weight)
        self.leaf.quant_state = getattr(weight, "quant_state", None)

    def detach(self, weight: Any) -> None:
        weight.quant_state = self.state(weight)


class Linear8bitLt(_Quantised):
    """bitsandbytes' 8-bit layer. Moving it to a device quantises its weight, which then is int8."""

    @property
    def packed(self) -> bool:
        return self.leaf.weight.dtype == torch.int8

    def dequantise(self, weight: Any) -> Tensor:
        if weight.dtype != torch.int8:
            return weight.data
        scale = weight.SCB if weight.SCB is not None else self.leaf.state.SCB  # running moves it to the state
        return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(weight.data, scale)

    def quantise(self, W: Tensor, like: Any) -> Any:
        settings = {"requires_grad": False, "has_fp16_weights": self.leaf.state.has_fp16_weights}
        make = sys.modules["bitsandbytes"].nn.Int8Params
        if like.dtype != torch.int8:
            return make(W.to(like.device, like.dtype), **settings)
        return make(W.cpu(), **settings).to(like.device)

    def attach(self, weight: Any) -> None:
        super().attach(weight)
        self.leaf.state.reset_grads()  # so that running takes the scale from the weight

    def detach(self, weight: Any) -> None:
        if getattr(weight, "SCB", None) is None and self.leaf.state.SCB is not None:
            weight.CB, weight.SCB = weight.data, self.leaf.state.SCB


class Unreadable(Base):
    """A layer whose weight is quantised in a way that is not known here. No method adapts it."""


class TorchAO(_Quantised):
    """An nn.Linear whose weight `torchao.quantization.quantize_` has made one of torchao's tensors."""

    label = "TorchaoLoraLinear"

    def check_writes(self, W: Tensor | None = None) -> None:
        kind = type(self.leaf.weight)
        if not issubclass(kind, sys.modules["torchao.quantization"].Int8Tensor):
            raise MergeError(
                f"Nothing can be merged into weights of torchao's kind {kind.__name__}: only int8 weights (Int8Tensor) "
                "can be quantised anew. Keep the adapter unmerged, or dequantise the layer first."
            )

    def dequantise(self, weight: Any) -> Tensor:
        W, before = weight.dequantize(), getattr(weight, "act_pre_scale", None)
        return W if before is None else W * before.to(W.dtype)  # (in,): what the layer multiplies its input with

    def quantise(self, W: Tensor, like: Any) -> Any:
        ao = sys.modules["torchao.quantization"]
        if like.act_pre_scale is not None:
            W = W / like.act_pre_scale.to(W.dtype)
        symmetric = like.zero_point is None or not like.zero_point.any()
        new = ao.Int8Tensor.from_hp(
            W,
            ao.PerBlock(tuple(like.block_size)),
            ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC,
            reduce_range=like.reduce_range,
        )
        names, rest = like.__tensor_flatten__()  # all else stays: how the input is quantised, and the dtype
        parts = {name: getattr(new if name in ("qdata", "scale", "zero_point") else like, name) for name in names}
        return nn.Parameter(type(like).__tensor_unflatten__(parts, rest, None, None), requires_grad=False)


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

    def check_writes(self, W: Tensor | None = None) -> None:
        raise MergeError("Adapters cannot be merged into GPTQ layers: quantising anew needs the data it was fitted to.")
