"""EVA - Explained Variance Adaptation. Paischer et al., 2024, https://arxiv.org/abs/2410.07170.

    A = the first r right singular vectors of the layer's inputs X (tokens, in), B = 0
    r = how many of the layer's shares S_i^2 / |X|^2 are among the sum(r) largest of all layers

The singular values come from as many batches as it takes for the vectors to stay where they are: eva_pca.py.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.bases import Linear, inference_mode_off
from ...core.errors import ConfigError, PeftWarning
from ...core.layer import Layer, adapted
from ...core.state import PREFIX
from ...core.targets import exactly
from ...core.tuner import tuner_of
from ...core.walk import walk
from .eva_search import Watched, linear_layers, search
from .initial import initialise


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run the model on a batch that is a mapping of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """The places (n, 2) of a batch of text that count: not padding, and not masked in the labels."""
    if not isinstance(model_input, Mapping):
        raise ConfigError("A batch must be a mapping; for others, pass `prepare_model_inputs_fn`.")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()  # (batch, length)
    if peft_config.eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The vectors (n, in) that a layer gets at the places `model_input` (n, 2)."""
    return _first(layer_input, layer_name)[model_input.T.unbind()]


def _all_vectors(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    return _first(layer_input, layer_name).flatten(0, -2)


def _first(layer_input: Any, layer_name: str) -> Tensor:
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(x, Tensor):
        raise ConfigError(f"'{layer_name}' is given a {type(x).__name__}: pass `prepare_layer_inputs_fn`.")
    return x


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Iterable,
    peft_config: Any = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The matrices A (r, in) of every linear layer, by its name in `model`; a rank of 0 means: leave it out.

    `model`: a PeftModel, whose adapters are off meanwhile, or a plain model with `peft_config`. `dataloader`, which
    has a length, is run through as often as needed; each batch goes to `forward_fn(model, batch)`. What counts of it
    `prepare_model_inputs_fn(batch, peft_config)` says, for `prepare_layer_inputs_fn(inputs, that, name)` to give the
    vectors (n, in) of a layer; that may be a mapping by layer. None for both: all vectors. With torch.distributed
    the vectors of all processes are put together, unless `gather_distributed_inputs=False`.

    Raises `ConfigError` when there is no data, no layer, or never enough vectors for the rank of a layer.
    """
    config = peft_config or getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        raise ConfigError("`peft_config` is required if the model is not a PeftModel.")
    if len(dataloader) == 0:  # type: ignore[arg-type]
        raise ConfigError("The dataloader is empty.")
    modules = linear_layers(model, config, adapter_name)
    special = prepare_layer_inputs_fn if isinstance(prepare_layer_inputs_fn, Mapping) else {}
    if unknown := [name for name in special if name not in modules]:
        raise ConfigError(f"`prepare_layer_inputs_fn` names layers that are not adapted: {', '.join(unknown)}.")
    common: Any = _all_vectors if special or prepare_layer_inputs_fn is None else prepare_layer_inputs_fn
    gather = gather_distributed_inputs and dist.is_available() and dist.is_initialized()
    watched = {name: Watched(name, m, special.get(name, common), gather) for name, m in modules.items()}
    devices = {p.device for p in model.parameters() if not p.is_meta}
    device, training = devices.pop() if len(devices) == 1 else None, model.training

    def run(inputs: Any) -> None:
        inputs = _move(inputs, device)
        seen = copy.deepcopy(inputs) if prepare_model_inputs_fn is None else prepare_model_inputs_fn(inputs, config)
        for layer in watched.values():
            layer.model_input = seen
        forward_fn(model, inputs)

    try:
        model.eval()
        with getattr(model, "disable_adapter", nullcontext)():
            return search(watched, dataloader, run, config, show_progress_bar)
    finally:
        for layer in watched.values():
            layer.stop()
        model.train(training)


def _move(inputs: Any, device: Any) -> Any:
    if device is None:
        return inputs
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _move(value, device) for key, value in inputs.items()}
    return type(inputs)(_move(value, device) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


@inference_mode_off()
@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give each layer of a PeftModel its rank and its A by EVA, and B = 0; layers of rank 0 lose the adapter.

    The adapter's configuration has init_lora_weights="eva", and says afterwards which ranks there are. `eva_state_dict`
    is what `get_eva_state_dict` gave; without it, it is made, with the other arguments. Layers that it does not hold
    start as with init_lora_weights=True, with a warning.

    Raises `ConfigError`, with nothing changed, when the adapter or the matrices do not fit.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        raise ConfigError(f"The model must be a PeftModel with an adapter {adapter_name!r}.")
    if len(model.active_adapters) > 1:
        raise ConfigError("`initialize_lora_eva_weights` works with a single active adapter only.")
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ConfigError("`initialize_lora_eva_weights` needs an adapter with `init_lora_weights='eva'`.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("Either `dataloader` or `eva_state_dict` is required.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    _set(model, config, adapter_name, eva_state_dict)


def _set(model: Any, config: Any, name: str, given: Mapping[str, Tensor]) -> None:
    tuner, lacking = tuner_of(model), []
    found = [(path, live, m) for path, live, m in adapted(tuner.model) if isinstance(m, Layer) and name in m.adapters]
    matrices = {path: given.get(PREFIX + live, given.get(path)) for path, live, _ in found}
    for path, _, layer in found:
        W = matrices[path]
        fits = isinstance(layer.base, Linear) and W is not None and W.shape[1:] == (layer.base.in_features,)
        if W is not None and not fits:
            raise ConfigError(f"The matrix for '{path}', {tuple(W.shape)}, does not fit {layer.base}.")
    if len(given) != sum(W is not None for W in matrices.values()):
        unknown = set(given) - {key for path, live, _ in found for key in (path, PREFIX + live)}
        raise ConfigError(f"`eva_state_dict` holds matrices for what is no layer: {sorted(unknown)[:5]}.")
    ranks, alphas = {}, {}
    for path, live, layer in found:
        adapter, W = layer.adapters[name], matrices[path]
        if W is not None and len(W) == 0:
            _take_off(tuner, path, live, layer, name)
            continue
        if W is not None:
            _put(adapter, W, config.eva_config.adjust_scaling_factors)
        else:
            lacking.append(path)
            if isinstance(adapter.lora_A, nn.Module) and adapter.lora_A.weight.is_meta:
                adapter.lora_A.to_empty(device=layer.base.device)
                adapter.lora_B.to_empty(device=layer.base.device)
            initialise(adapter, True)
        ranks[path], alphas[path] = adapter.r, adapter.lora_alpha
    config.target_modules = exactly(set(ranks), [path for path, _, _ in walk(tuner.model)])
    config.rank_pattern = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != config.r}
    config.alpha_pattern = {f"^{re.escape(path)}": a for path, a in alphas.items() if a != config.lora_alpha}
    if lacking:
        warnings.warn(f"Not in the `eva_state_dict`, so not initialised by EVA: {', '.join(lacking)}.", PeftWarning)


def _put(adapter: Any, W: Tensor, adjust: bool) -> None:
    """A = W (r, in), B = 0. `adjust`: alpha grows with the rank, so that the scale stays what it was."""
    A, B, r = adapter.lora_A, adapter.lora_B, len(W)
    if adjust and r != adapter.r:
        adapter.lora_alpha *= r / adapter.r
    adapter.r = A.out_features = B.in_features = r
    adapter.scaling = adapter.initial_scaling()
    W = W.to(adapter.base.device, A.weight.dtype, copy=True)
    A.weight = nn.Parameter(W, A.weight.requires_grad)
    B.weight = nn.Parameter(W.new_zeros(B.out_features, r), B.weight.requires_grad)


def _take_off(tuner: Any, path: str, live: str, layer: Layer, name: str) -> None:
    """Remove the adapter from one layer, and the layer when it has no other."""
    layer.delete_adapter(name)
    if not layer.adapters:
        head, _, last = live.rpartition(".")
        tuner.model.get_submodule(head)._modules[last] = layer.base_layer
        tuner.targeted_module_names.remove(path)
