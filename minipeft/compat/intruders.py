"""Intruder dimensions, and how to take them back. Shuttleworth et al., 2024, https://arxiv.org/abs/2410.21228

    W + dW = U diag(S) V^T               W (out, in): frozen, dW = s B A
    u_i, i < top_k, is an intruder       if max_j |u_i . u0_j| < epsilon, u0_j: the left singular vectors of W
    dW' = dW - (1 - lambda) sum_i S_i u_i v_i^T          the sum is over intruders
    s B' A' = dW'                        truncated to rank r

What training added along directions that W does not have is what makes it forget; lambda = 1 leaves it as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.bases import autocast_off
from ..core.errors import AdapterNameError, MergeError, UnsupportedFeatureError, UnsupportedLayerError
from ..core.layer import Layer, adapted
from ..methods.lora.lora import LowRank
from ..model.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict


@torch.no_grad()
@autocast_off()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add an adapter, and make it active, that is a LoRA without some of its intruder dimensions.

    Among the `top_k` strongest directions of each merged weight, those are intruders whose cosine with every direction
    of the frozen weight is below `threshold_epsilon`; of them the share `mitigation_lambda` is kept. `logging_sink` is
    called with a line for each layer. Raises `UnsupportedFeatureError` for a model of another method, and
    `UnsupportedLayerError` for layers whose change of the weight is no product of two factors.
    """
    if peft_model.peft_type != "LORA":
        raise UnsupportedFeatureError(f"Intruder dimensions are known of LoRA, not of {peft_model.peft_type}.")
    if old_adapter_name not in peft_model.peft_config:
        have = sorted(peft_model.peft_config)
        raise AdapterNameError(f"Adapter {old_adapter_name} not found; this model has {have}.")
    everywhere = [(path, m) for path, _, m in adapted(peft_model.base_model.model) if isinstance(m, Layer)]
    found = [(path, layer) for path, layer in everywhere if old_adapter_name in layer.adapters]
    config = copy.deepcopy(peft_model.peft_config[old_adapter_name])
    for path, layer in found:
        if not isinstance(layer.adapters[old_adapter_name], LowRank) or len(layer.base.shape) != 2:
            raise UnsupportedLayerError(f"The adapter of '{path}' is no product of two matrices beside the weight.")
        if layer.merged:
            raise MergeError(f"Adapters are merged into '{path}'; call `unmerge_adapter()` first.")
        if layer.adapters[old_adapter_name].changes_base(config):
            how = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            raise UnsupportedFeatureError(f"The adapter changed the weight of '{path}'. Convert it first: {how}.")
    peft_model.add_adapter(new_adapter_name, config)
    tensors = get_peft_model_state_dict(peft_model, adapter_name=old_adapter_name, save_embedding_layers=False)
    set_peft_model_state_dict(peft_model, tensors, new_adapter_name)
    for path, layer in found:
        old, new = layer.adapters[old_adapter_name], layer.adapters[new_adapter_name]
        W, D = layer.base.read()[0].float(), old.delta().float()
        taken, count = intruders(W, W + D, top_k, threshold_epsilon)
        if count:
            B, A = truncated((D - (1 - mitigation_lambda) * taken) / old.scaling, old.r)
            for factor, value in ((new.lora_A, A), (new.lora_B, B)):
                layer.base.matrix(factor).copy_(value)
        if logging_sink is not None:
            logging_sink(f"{path}: {count or 'no'} intruder dimensions")
    peft_model.set_adapter(new_adapter_name)


def intruders(W: Tensor, merged: Tensor, top_k: int, epsilon: float) -> tuple[Tensor, int]:
    """The part of the merged weight along its intruder dimensions, (out, in), and how many those are."""
    U0 = torch.linalg.svd(W, full_matrices=False)[0]
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    strange = (U.T @ U0).abs().amax(1)[:top_k] < epsilon
    at = strange.nonzero().flatten()
    return (U[:, at] * S[at]) @ Vh[at], len(at)


def truncated(D: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) of one norm, with B A the closest matrix of rank r to D."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    root = S[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]
