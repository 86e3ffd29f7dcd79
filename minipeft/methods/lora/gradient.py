"""LoRA-GA - Low-Rank Adaptation with Gradient Approximation. Wang et al., 2024, https://arxiv.org/abs/2407.05000.

    G = U diag(S) V^T                  the gradient of W (out, in), by a randomised SVD
    A = V^T[I], B = c U[:, J] diag(S[J])    A: (r, in), B: (out, r), W <- W - s B A

I and J are, among the first 2 r, by `direction`: ArBr the odd and the even ones, A2rBr the second and the first half,
ArB2r the other way round, random the same r for both. The factor c, by `scale`: stable out^(1/4) / gamma^(1/2),
weight_svd the largest singular value of W over that of B, gd_scale 1 / s (for A too), unit 1.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CheckpointError, ConfigError, PeftWarning
from ...core.offload import device_of
from ...core.plan import model_config
from ...core.targets import linear_targets
from ...model.defaults import default_targets

GRADIENT = "_peft_loraga_grad"  # where a layer keeps it until the adapter is built; also the name in cache files


def start(adapter: Any, W: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """A (r, in), B (out, r) and W - s B A, for the weight W (out, in) in float32; None without a gradient."""
    leaf, r, s = adapter.base.leaf, adapter.r, adapter.scaling
    if (G := vars(leaf).get(GRADIENT)) is None:
        warnings.warn(
            "LoRA-GA has no gradient to start from (preprocess_loraga gives it): A and B start as usual. If they are "
            "loaded from a checkpoint, it fits only the base weights that it was trained with.",
            PeftWarning,
        )
        return None
    if adapter.config.lora_ga_config is None:
        raise ConfigError("`lora_ga_config` must be given when init_lora_weights is 'lora_ga'.")
    if 2 * r > min(W.shape):
        raise ConfigError(f"LoRA-GA takes 2 r = {2 * r} singular vectors; '{adapter.path}' is {tuple(W.shape)}.")
    c, dtype = adapter.config.lora_ga_config, adapter.base.stored()[0].dtype
    U, S, V = torch.svd_lowrank(adapter.base.canonical(G.to(W)), q=min(4 * r, *W.shape), niter=4)
    rows: Any
    columns: Any
    first, second = slice(0, r), slice(r, 2 * r)
    if c.direction == "random":
        rows = columns = torch.randperm(2 * r)[:r]
    else:
        rows, columns = {
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
            "A2rBr": (second, first),
            "ArB2r": (first, second),
        }[c.direction]
    A, B, top = V.T[rows], U[:, columns] * S[columns], S[columns][0]
    if c.scale == "stable":
        B = B * (len(adapter.base.stored()[0]) ** 0.25 / c.stable_gamma**0.5)  # PEFT: `in` takes out's place in Conv1D
    elif c.scale == "weight_svd":
        of_W = torch.svd_lowrank(W, q=r, niter=4)[1]
        B = B * (of_W[0] / top) if top > 0 else B
    elif c.scale == "gd_scale":
        A, B = A / s, B / s
    A, B = A.to(dtype).contiguous(), B.to(dtype).contiguous()
    adapter.on_commit(lambda: vars(leaf).pop(GRADIENT, None))
    return A, B, W - s * (B.float() @ A.float())


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], Any], cache_file: str | os.PathLike | None = None
) -> None:
    """Give the linear layers that `lora_config` means the gradients that LoRA-GA starts from; then get_peft_model.

    `train_step()` runs the model forward and backward, on as many batches as wanted; a layer's gradient is the mean
    over its backward passes. `cache_file` keeps the gradients: when it is there, `train_step` is not called. The
    model is left as it was but for them.

    Raises `ConfigError` for a configuration without `lora_ga_config`, quantised layers, or when no layer is meant.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError("LoRA-GA needs a LoraConfig with init_lora_weights='lora_ga' and a `lora_ga_config`.")
    default_targets(lora_config, model, model_config(model).get("model_type"))
    targets = linear_targets(model, lora_config)
    if not targets:
        raise ConfigError("No supported layers were found: LoRA-GA is for linear layers in `target_modules`.")
    for path, base in targets.items():
        if base.packed:
            raise ConfigError(f"LoRA-GA needs gradients in full precision, but '{path}' is quantised.")
        if base.computed is not None:
            raise ConfigError(f"LoRA-GA needs the gradient of a parameter, but '{path}' computes its weight.")
    layers = {path: base.leaf for path, base in targets.items()}
    cache = None if cache_file is None else Path(cache_file)
    if cache is not None and cache.is_file() and cache.stat().st_size:
        stored = torch.load(cache, map_location=device_of(model), weights_only=True)
        gradients = {path: stored.get(f"{path}.{GRADIENT}") for path in layers}
        wrong = [path for path, G in gradients.items() if G is None or G.shape != layers[path].weight.shape]
        if wrong:
            raise CheckpointError(f"{cache} has no gradient that fits '{wrong[0]}': it was made for something else.")
    else:
        gradients = _mean_gradients(model, layers, train_step)
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.save({f"{path}.{GRADIENT}": G for path, G in gradients.items()}, cache)
    for path, G in gradients.items():
        setattr(layers[path], GRADIENT, G)


def _mean_gradients(model: nn.Module, layers: dict[str, Any], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    """What `train_step` gives each layer's weight, which alone are trained meanwhile, by path."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training, passes, hooks = model.training, Counter[str](), []
    try:
        for p, _, _ in before:
            p.requires_grad, p.grad = False, None
        for path, leaf in layers.items():
            leaf.weight.requires_grad = True
            hooks.append(leaf.register_full_backward_hook(lambda *args, path=path: passes.update([path])))
        model.train()
        with torch.enable_grad():
            train_step()
        return {path: layers[path].weight.grad / count for path, count in passes.items()}
    finally:
        for hook in hooks:
            hook.remove()
        for p, requires_grad, grad in before:
            p.requires_grad, p.grad = requires_grad, grad
        model.train(training)
