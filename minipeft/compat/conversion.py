"""Other adapters as LoRA: the truncated singular value decomposition of what an adapter adds to a weight.

    dW = U diag(S) V^T                   dW (out, in): merged weight - frozen weight
    A = V^T[:k], B = U[:, :k] diag(S[:k])    A: (k, in), B: (out, k)

k is a fixed rank, or for each layer the smallest one that keeps a given share of the energy, sum_i S_i^2.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..core.bases import Linear, autocast_off
from ..core.config import PeftType
from ..core.errors import (
    AdapterNameError,
    ConfigError,
    MergeError,
    PeftWarning,
    UnsupportedFeatureError,
    UnsupportedLayerError,
)
from ..core.files import write_checkpoint
from ..core.folding import upcast
from ..core.layer import Layer, adapted
from ..core.state import PREFIX, serialise
from ..core.targets import exactly
from ..core.tuner import progress_bar, tuner_of
from ..core.walk import walk
from ..methods.lora.lora import LoraConfig
from ..model.wrappers import ModulesToSaveWrapper


@torch.no_grad()
@autocast_off()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA closest to an adapter of another method: its configuration (scale 1), and its checkpoint's tensors.

    Works for every method that merges and leaves biases alone, on linear layers. `rank`: an int for all layers, or a
    share of the energy from above 0 to 1, from which each layer's own rank follows. `modules_to_save` come along.
    `compile_kwargs`: compile the decomposition, with these arguments of torch.compile.

    Raises `UnsupportedLayerError` (a `TypeError`) when a layer cannot be converted or none is adapted, `ConfigError`
    for a rank that cannot be, `UnsupportedFeatureError` for what the adapter trains or changes beside linear layers.
    """
    if not (0 < rank <= 1 if isinstance(rank, float) else rank > 0):
        raise ConfigError(f"`rank` must be a positive integer, or a share of the energy in (0, 1], got {rank}.")
    configs = getattr(model, "peft_config", {})
    if configs and adapter_name not in configs:
        raise AdapterNameError(f"Adapter {adapter_name} not found; this model has {sorted(configs)}.")
    found = [m for _, _, m in adapted(model) if isinstance(m, Layer) and adapter_name in m.adapters]
    if not found:
        raise UnsupportedLayerError(f"Could not detect any layer of adapter {adapter_name!r} to convert to LoRA.")
    source = configs.get(adapter_name, found[0].adapters[adapter_name].config)
    _check(source, [layer.adapters[adapter_name] for layer in found])
    if source.peft_type == PeftType.LORA:
        warnings.warn(f"Adapter {adapter_name!r} is a LoRA already; this gives one of another rank.", PeftWarning)
    factors = truncated if compile_kwargs is None else torch.compile(truncated, **compile_kwargs)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in progress_bar(found, "Converting to LoRA", progressbar):
        adapter = layer.adapters[adapter_name]
        with layer.onloaded():
            D = _delta(adapter)  # (out, in)
        if not isinstance(rank, float) and rank > min(D.shape):
            shape = tuple(D.shape)
            raise ConfigError(f"The chosen rank {rank} is larger than the weight of '{adapter.path}', {shape}, allows.")
        dtype = next((p.dtype for p in adapter.parameters()), D.dtype)
        A, B = factors(D, rank)
        pairs[adapter.path] = A.to(dtype, copy=True).contiguous(), B.to(dtype, copy=True).contiguous()

    tuner = tuner_of(model)
    root, head = (model, "") if tuner is None else (tuner.model, PREFIX)
    ranks = {path: len(A) for path, (A, _) in pairs.items()}
    r = max(ranks.values())
    pattern = {f"^{re.escape(path)}": k for path, k in ranks.items() if k != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=exactly(set(pairs), [path for path, _, _ in walk(root)]),
        layer_replication=getattr(source, "layer_replication", None),
        modules_to_save=copy.copy(getattr(source, "modules_to_save", None)),
        base_model_name_or_path=source.base_model_name_or_path,
        task_type=source.task_type,
    )
    tensors = {}
    for path, (A, B) in pairs.items():
        tensors[f"{head}{path}.lora_A.weight"], tensors[f"{head}{path}.lora_B.weight"] = A, B
    for path, _, module in adapted(root):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            state = module.modules_to_save[adapter_name].state_dict()
            tensors |= {f"{head}{path}.{key}": tensor.clone() for key, tensor in state.items()}
    return config, tensors


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write what `convert_to_lora` gives into the folder `path`, for `PeftModel.from_pretrained`; the errors are its.

    An adapter that is there already is replaced in one step. Raises `CheckpointError` when `path` is a file.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    write_checkpoint(path, config.to_json(None), serialise(tensors))


def truncated(D: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k) with B A the closest matrix of rank k to D (out, in); a float is a share of energy."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    k = rank
    if isinstance(rank, float):
        energy = torch.cumsum(S**2, 0)
        k = int(torch.searchsorted(energy, rank * energy[-1])) + 1
    return Vh[:k], U[:, :k] * S[:k]


def _check(config: Any, adapters: list[Any]) -> None:
    """Refuse what a LoRA on linear layers cannot say."""
    trained = getattr(config, "bias", "none") or "none"
    if isinstance(trained, str) and trained != "none":
        raise UnsupportedFeatureError(f"The adapter trains biases (bias={trained!r}), so it cannot be made a LoRA.")
    if getattr(config, "trainable_token_indices", None):
        raise UnsupportedFeatureError("An adapter with `trainable_token_indices` cannot be made a LoRA.")
    for adapter in adapters:
        base = adapter.base
        if not isinstance(base, Linear) or base.needs_weights:
            what = f"'{adapter.path}' is {base.label}"
            raise UnsupportedLayerError(f"Only adapters of linear layers can be converted to LoRA, but {what}.")
        if adapter.changes_base(config):
            how = " Convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            raise UnsupportedFeatureError(
                f"The adapter on '{adapter.path}' changed the base weights, so a LoRA of it would not fit the original "
                f"model.{'' if adapter.rewrites else how}"
            )


def _delta(adapter: Any) -> Tensor:
    """What merging adds to W (out, in), in at least float32. Raises `UnsupportedLayerError` when it adds more."""
    W, b = adapter.base.read()
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    b = None if b is None else b.to(W.dtype)
    with upcast(adapter):
        try:
            folded, bias = adapter.fold(W, b)
        except MergeError as error:
            raise UnsupportedLayerError(f"The adapter on '{adapter.path}' cannot be made a LoRA: {error}") from error
        if bias is not None and not torch.equal(bias, torch.zeros_like(bias) if b is None else b):
            raise UnsupportedLayerError(f"The adapter changes the bias of '{adapter.path}', which no LoRA can do.")
        D, alone = folded - W, adapter.fold(torch.zeros_like(W), b)[0]
    rounding = 4 * torch.finfo(W.dtype).eps * torch.maximum(W.abs(), folded.abs())
    return alone if ((D - alone).abs() <= rounding).all() else D  # an additive one without the rounding of W + dW
