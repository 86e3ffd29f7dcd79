"""LoftQ - LoRA-Fine-Tuning-Aware Quantization. Li et al., 2023, https://arxiv.org/abs/2310.08659, algorithm 1.

    A = B = 0;  repeat T times:   Q = q(W - B A),   B A = the closest matrix of rank r to W - Q

    q: quantise and dequantise, by bitsandbytes as NF4 or int8      W: (out, in), which Q takes the place of
    A = sqrt(S) V^T: (r, in), B = U sqrt(S): (out, r)               T = loftq_iter
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.bases import inference_mode_off
from ...core.errors import CheckpointError, ConfigError, UnsupportedFeatureError, UnsupportedLayerError, nearest
from ...core.layer import Layer, adapted
from ...core.quantised import Linear4bit
from .configs import LoftQConfig

WEIGHTS = "model.safetensors"


def start(adapter: Any, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, in), B (out, r) and Q (out, in) for the weight W (out, in) in float32."""
    c: Any = adapter.config.loftq_config
    c = LoftQConfig.of(c) if isinstance(c, dict) else c
    if c.loftq_bits not in (4, 8) or c.loftq_iter <= 0:
        raise ConfigError(f"LoftQ quantises to 4 or 8 bits, in one or more steps, got {c}.")
    if adapter.base.packed:
        raise ConfigError(
            f"'{adapter.path}' is quantised already: use `replace_lora_weights_loftq`, not LoftQ's start."
        )
    rest = W
    for _ in range(c.loftq_iter):
        Q = quantised(rest, c.loftq_bits)
        A, B = closest(W - Q, adapter.r)
        rest = W - B @ A  # PEFT: without the scale s, so that s B A makes up for the error only when alpha = r
    return A, B, Q


def quantised(W: Tensor, bits: int) -> Tensor:
    """W (out, in), float32, rounded to what 4 or 8 bits can hold."""
    try:
        bnb = importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ConfigError("LoftQ needs bitsandbytes, which cannot be imported here.") from error
    if bits == 4:
        return bnb.dequantize_4bit(*bnb.quantize_4bit(W.contiguous(), quant_type="nf4"))
    return bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(W.half().contiguous())[:2])


def closest(D: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with B A the closest matrix of rank r to D (out, in)."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


@inference_mode_off()
@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set A and B on layers that bitsandbytes holds in 4 bits, to make up for what quantising took from the weights.

    `model_path`: the full weights, model.safetensors or a folder with it or its shards; by default where the model
    says that it comes from. `callback(peft_model, path)` is called after each layer: when it returns False, the layer
    gets its old A and B back.

    Raises `CheckpointError`, with nothing changed, when a weight is missing or misshapen, `UnsupportedLayerError` when
    there is no 4-bit layer, and `UnsupportedFeatureError` for DoRA, whose magnitudes would not fit any more.
    """
    here = [m for _, _, m in adapted(peft_model) if isinstance(m, Layer) and adapter_name in m.adapters]
    found = [m.adapters[adapter_name] for m in here if isinstance(m.base, Linear4bit) and m.method == "LORA"]
    if not found or not hasattr(peft_model, "get_base_model"):
        raise UnsupportedLayerError(f"No LoRA layer of adapter {adapter_name!r} on 4-bit weights in a PeftModel.")
    if found[0].config.use_dora:
        raise UnsupportedFeatureError("LoftQ is not for DoRA: its magnitudes would not fit the new A and B.")
    base_model = peft_model.get_base_model()
    stored = Stored(_source(base_model) if model_path is None else Path(model_path))
    prefix = f"{getattr(base_model, 'base_model_prefix', '')}."
    keys = [stored.key(f"{a.path}.weight", prefix, a.base.shape) for a in found]
    for adapter, key in zip(found, keys):
        Q = adapter.base.read()[0].float()
        before = [factor.weight.data for factor in (adapter.lora_A, adapter.lora_B)]
        A, B = closest(stored.read(key).to(Q) - Q, adapter.r)
        adapter.lora_A.weight.data, adapter.lora_B.weight.data = A.to(before[0]), B.to(before[1])
        if callback is not None and not callback(peft_model, adapter.path):
            adapter.lora_A.weight.data, adapter.lora_B.weight.data = before


class Stored:
    """The tensors of a model's safetensors files, read one by one."""

    def __init__(self, path: Path):
        file = path if path.name.endswith(WEIGHTS) else path / WEIGHTS
        index = file.with_name(f"{WEIGHTS}.index.json")
        if file.is_file():
            with _open(file) as f:
                self.files = dict.fromkeys(f.keys(), file)
        elif index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {key: file.with_name(name) for key, name in shards.items()}
        else:
            raise CheckpointError(f"Could not find file {file}, nor {index.name}, which lists its parts.")

    def key(self, name: str, prefix: str, shape: tuple[int, ...]) -> str:
        """What the tensor `name` is called there: so, or without `prefix`."""
        key = name if name in self.files else name.removeprefix(prefix)
        if key not in self.files:
            raise CheckpointError(f"The stored model has no tensor {name!r}.{nearest(name, self.files)}")
        with _open(self.files[key]) as f:
            size = tuple(f.get_slice(key).get_shape())
        if size != shape:
            raise CheckpointError(f"The stored {key!r} is {size}, but the layer is {shape}.")
        return key

    def read(self, key: str) -> Tensor:
        with _open(self.files[key]) as f:
            return f.get_tensor(key)


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt", device="cpu")


def _source(model: Any) -> Path:
    """Where a transformers model was loaded from: a folder, or the hub's copy on this disk."""
    name: Any = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and os.path.isdir(name):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:
        why = f"the model says {name!r}, which is neither a folder nor a downloaded model"
        raise CheckpointError(f"Pass `model_path`, the full weights: {why}.") from error
