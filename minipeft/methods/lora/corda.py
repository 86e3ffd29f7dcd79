"""CorDA - Context-Oriented Decomposition Adaptation. Yang et al., 2024, https://arxiv.org/abs/2406.05223.

    W C = U diag(S) V^T,   W = U diag(S) V^T C^-1        C (in, in): the mean of X^T X over inputs X of the layer
    A = sqrt(S[I] / s) (V^T C^-1)[I],   B = U[:, I] sqrt(S[I] / s)      A: (r, in), B: (out, r), W <- W - s B A

I are the first r ("ipm": adapt what matters for the inputs) or the last r ("kpm": keep it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.errors import CheckpointError, ConfigError
from ...core.offload import device_of
from ...core.plan import model_config
from ...core.targets import linear_targets, pattern_value
from ...core.tuner import progress_bar
from ...model.defaults import default_targets


class Eigens(NamedTuple):
    """What a layer keeps, as `eigens`, until the adapter is built; the names are those of cache files."""

    S_WC: Tensor  # (r,)
    U_WC: Tensor  # (out, r)
    V_WC: Tensor  # (in, r), times C^-1


def start(adapter: Any, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, in), B (out, r) and W - s B A, for the weight W (out, in) in float32."""
    leaf, r, s = adapter.base.leaf, adapter.r, adapter.scaling
    if (eigens := vars(leaf).get("eigens")) is None:
        raise ConfigError(f"CorDA has not seen '{adapter.path}': run `preprocess_corda` on this model first.")
    S, U, V = (t.to(W) for t in eigens)
    if (len(S), U.shape, V.shape) != (r, (W.shape[0], r), (W.shape[1], r)):
        raise ConfigError(f"`preprocess_corda` ran for rank {len(S)} on '{adapter.path}', but its rank is {r}.")
    if not all(torch.isfinite(t).all() for t in (S, U, V)):
        raise ConfigError(f"What `preprocess_corda` found for '{adapter.path}' is not finite.")
    root = (S / s).sqrt()
    A, B = (V * root).T.contiguous(), U * root
    adapter.on_commit(lambda: vars(leaf).pop("eigens", None))
    return A, B, W - s * B @ A


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Give the linear layers that `lora_config` means what CorDA starts from; then get_peft_model.

    `run_model()` runs `hooked_model` (default: `model`) on sample data. What its layers are given is kept in
    `corda_config.covariance_file`, what comes of it in `corda_config.cache_file`; a file that is there is used instead.

    Raises `ConfigError` when there is nothing to run, no layer is meant, a layer was not used, or its inputs are not
    finite, and `CheckpointError` for files that were made for another model.
    """
    c = lora_config.corda_config
    if c is None:
        raise ConfigError("CorDA needs a LoraConfig with init_lora_weights='corda' and a `corda_config`.")
    default_targets(lora_config, model, model_config(model).get("model_type"))
    layers = linear_targets(model, lora_config)
    if not layers:
        raise ConfigError("No supported layers were found: CorDA is for linear layers in `target_modules`.")
    if (cache := _there(c.cache_file, model)) is not None:
        names = {path: [f"{path}.eigens.{field}" for field in Eigens._fields] for path in layers}
        _require(c.cache_file, [name for three in names.values() for name in three], cache)
        found = {path: Eigens(*(cache[name] for name in three)) for path, three in names.items()}
    else:
        products = _there(c.covariance_file, model)
        if products is None:
            products = _products(layers, model if hooked_model is None else hooked_model, lora_config, run_model)
            _save(c.covariance_file, products)
        _require(c.covariance_file, layers, products)
        found = {}
        for path, base in progress_bar(list(layers.items()), "Decomposing", c.verbose):
            r = pattern_value(lora_config.rank_pattern, path, lora_config.r)
            if r > min(base.shape):
                raise ConfigError(f"The rank {r} is larger than '{path}', {base.shape}, allows.")
            found[path] = decompose(base.read()[0].float(), products[path].float(), r, c.corda_method)
            if not c.prune_temporary_fields:
                base.leaf.covariance_matrix = products[path]
        _save(c.cache_file, {f"{p}.eigens.{f}": t for p, e in found.items() for f, t in e._asdict().items()})
    for path, eigens in found.items():
        layers[path].leaf.eigens = eigens


def decompose(W: Tensor, C: Tensor, r: int, method: str) -> Eigens:
    """Of W (out, in) and C (in, in); the diagonal of C grows until its inverse is one."""
    eye, damp = torch.eye(len(C), device=C.device), 0.01
    while True:
        fixed = C + damp * C.diag().mean() * eye
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, eye) < 0.05:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(W @ fixed, full_matrices=False)
    I = slice(r) if method == "ipm" else slice(len(S) - r, None)
    return Eigens(S[I].clone(), U[:, I].clone(), (Vh @ inverse).T[:, I].clone())


def _products(layers: Any, model: nn.Module, config: Any, run: Callable[[], Any] | None) -> dict[str, Tensor]:
    """C of each layer, by path: the mean over the layer's runs."""
    if run is None:
        raise ConfigError("`run_model` must be given while neither the covariance file nor the cache file is there.")
    sums: dict[str, Any] = dict.fromkeys(layers, 0)
    counts, hooks, training = dict.fromkeys(layers, 0), [], model.training
    half = config.corda_config.use_float16_for_covariance

    def see(path: str, args: Any) -> None:
        x = args[0].detach().flatten(0, -2)
        x = x if half else x.float()
        x = x / x.max().abs()  # PEFT: by the largest number, whatever the smallest is
        if not torch.isfinite(product := x.T @ x).all():
            raise ConfigError(f"The inputs of '{path}' are not finite, or their products are not.")
        sums[path], counts[path] = sums[path] + product, counts[path] + 1

    try:
        for path in layers:
            leaf = model.get_submodule(path)
            hooks.append(leaf.register_forward_hook(lambda module, args, output, path=path: see(path, args)))
        model.eval()
        run()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if unused := [path for path, count in counts.items() if not count]:
        raise ConfigError(f"'{unused[0]}' was not used when the model ran; leave it out of the target modules.")
    return {path: total / counts[path] for path, total in sums.items()}


def _there(file: str | None, model: nn.Module) -> dict[str, Tensor] | None:
    if file is None or not Path(file).is_file() or not Path(file).stat().st_size:
        return None
    return torch.load(file, map_location=device_of(model), weights_only=True)


def _require(file: str | None, names: Iterable[str], stored: dict[str, Tensor]) -> None:
    if missing := [name for name in names if name not in stored]:
        raise CheckpointError(f"{file} has nothing for '{missing[0]}': it was made for another model.")


def _save(file: str | None, tensors: dict[str, Tensor]) -> None:
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)
