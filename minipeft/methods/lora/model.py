"""What a model with LoRA adapters can do besides: combine several of them into a new one, and regularise variants.

Combining works on the factors or on the deltas D_i = s_i B_i A_i, with f one of the functions of merging.py:

    linear, ties, dare_*, magnitude_prune    A = f(A_i; c_i), B = f(B_i; c_i), c_i = sqrt(w_i s_i)     rough, cheap
    svd, *_svd                               B A = the best approximation of rank r to f(D_i; w_i)
    cat                                      A = all w_i s_i A_i, B = all B_i: exact, of the sum of all ranks
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.bases import autocast_off
from ...core.errors import AdapterNameError, ConfigError, PeftWarning, UnsupportedFeatureError
from ...core.folding import upcast
from ...core.layer import adapter_parts, layers
from ...core.offload import onload
from ...model.tuner import BaseTuner
from . import merging

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "linear": merging.task_arithmetic,
    "ties": merging.ties,
    "dare_linear": merging.dare_linear,
    "dare_ties": merging.dare_ties,
    "magnitude_prune": merging.magnitude_prune,
}
TYPES = ("svd", "cat", *FUNCTIONS, *(f"{name}_svd" for name in FUNCTIONS if name != "linear"))


class LoraModel(BaseTuner, method="LORA"):
    """A model with LoRA adapters."""

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """The sum of KaSA's regularisation over all layers, a scalar to be added to the loss; 0.0 without KaSA.

        Of the adapters `adapter_names` (default: the active ones). Raises `AdapterNameError` for names not there.
        """
        return sum(self._losses("kasa_config", adapter_names), 0.0)

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """The mean of MonteCLoRA's divergences over all layers, a scalar to be added to the loss; 0.0 in eval mode.

        Of the adapters `adapter_names` (default: the active ones). Raises `AdapterNameError` for names not there.
        """
        losses = self._losses("monteclora_config", adapter_names)
        return sum(losses, 0.0) / max(len(losses), 1)

    def _losses(self, field: str, adapter_names: str | list[str] | None) -> list[Tensor]:
        """`loss()` of each adapter, layer by layer, whose variant the configuration's `field` asks for."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if unknown := [name for name in names or () if name not in self.peft_config]:
            raise AdapterNameError(f"Adapter {unknown[0]} not found; this model has {sorted(self.peft_config)}.")
        names = self.active_adapters if names is None else names
        found = [layer.adapters[name] for layer in layers(self.model) for name in names if name in layer.adapters]
        with onload(*adapter_parts(self.model)):
            return [adapter.loss() for adapter in found if adapter.asked_by == field]

    @autocast_off()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal[
            "svd",
            "linear",
            "cat",
            "ties",
            "ties_svd",
            "dare_ties",
            "dare_linear",
            "dare_ties_svd",
            "dare_linear_svd",
            "magnitude_prune",
            "magnitude_prune_svd",
        ] = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add `adapter_name`, a combination of `adapters` with `weights`; it is frozen and not active.

        A negative weight takes the adapter as its negative. One adapter alone is only scaled, whatever the type. The
        new scaling is 1, on every layer. `density` and `majority_sign_method` belong to the types that prune, `svd_...`
        to those by singular values: `svd_rank` defaults to the largest rank, `svd_clamp` is a quantile from 0 to 1
        beyond which factors are cut off.

        Raises `PeftError`, with nothing changed, when the adapters cannot be combined: DoRA and trained biases or
        modules do not add up, and the types that work on factors need equal ranks. When `adapter_name` is there
        already, warns and does nothing.
        """
        if adapter_name in self.peft_config:
            warnings.warn(f"Adapter {adapter_name} exists already; nothing was combined.", PeftWarning, stacklevel=2)
            return
        parts = merging.parts_of(self, adapters, weights)
        combine = Combine("linear" if len(adapters) == 1 else combination_type, density, majority_sign_method)
        combine.svd = {"clamp": svd_clamp, "full_matrices": svd_full_matrices, "driver": svd_driver}
        for own in parts.values():
            combine.check(own)
        if len({adapter.sums for own in parts.values() for _, adapter in own}) > 1:
            raise UnsupportedFeatureError("aLoRA adapters add up only with ones of the same `alora_invocation_tokens`.")
        if svd_rank is not None and svd_rank <= 0:
            raise ConfigError(f"`svd_rank` should be a positive integer, got {svd_rank}.")
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        ranks = [max(c.r, *(c.rank_pattern or {}).values()) if c.rank_pattern else c.r for c in configs]
        r, pattern = sum(ranks) if combine.kind == "cat" else svd_rank or max(ranks), {}
        if combine.on_factors:
            of_path = {own[0][1].path: own[0][1].r for own in parts.values()}
            r = max(of_path.values())
            pattern = {f"^{re.escape(path)}": rank for path, rank in of_path.items() if rank != r}
        init = configs[0].init_lora_weights  # only its random numbers matter, those of DARE come after them
        bias = any(c.lora_bias for c in configs)
        plan = merging.plan_union(
            self,
            adapter_name,
            adapters,
            parts,
            fits=lambda new, own: True,
            fields={"target_modules": lambda own: True},
            r=r,
            lora_alpha=r,
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            use_rslora=False,
            lora_bias=bias,
            init_lora_weights=init if init is False or (init == "gaussian" and not bias) else True,
        )
        with torch.no_grad(), onload(*adapter_parts(self.model)):
            for _, scratch, joins in plan.new:
                if joins is not None and not scratch.tied:
                    combine.fill(scratch.adapters[adapter_name], parts[joins])
        merging.accept(plan, parts)


class Combine:
    """One way of combining: `fill` sets the factors of a new adapter from those of others."""

    svd: dict[str, Any]

    def __init__(self, kind: str, density: float | None, majority_sign_method: str):
        if kind not in TYPES:
            raise ConfigError(f"Invalid combination_type: {kind!r}. It must be one of {', '.join(TYPES)}.")
        self.kind, self.on_factors = kind, kind in FUNCTIONS
        self.name = "linear" if kind in ("svd", "cat") else kind.removesuffix("_svd")
        self.options: dict[str, Any] = {}
        if self.name != "linear":
            if density is None or not density >= 0 or (density == 0 and "dare" in kind):
                raise ConfigError(f"combination_type {kind!r} needs a `density` above 0 and up to 1, got {density}.")
            self.options["density"] = density
        if self.name.endswith("ties"):
            if majority_sign_method not in ("total", "frequency"):
                method = majority_sign_method
                raise ConfigError(f"`majority_sign_method` must be 'total' or 'frequency', got {method!r}.")
            self.options["majority_sign_method"] = majority_sign_method

    def check(self, own: list[tuple[float, Any]]) -> None:
        """Raise `PeftError` for adapters of one layer that cannot be combined."""
        path = own[0][1].path
        for _, adapter in own:
            if adapter.sums is None:
                raise UnsupportedFeatureError(
                    f"{type(adapter).__name__} adapters do not add up so they cannot be combined ({adapter.name!r})."
                )
            if adapter.changes_base(adapter.config):
                raise UnsupportedFeatureError(
                    f"Adapter {adapter.name!r} changed the base weights (init_lora_weights="
                    f"{adapter.config.init_lora_weights!r}), so it cannot be combined. Convert it first: "
                    "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
                )
        if self.kind in ("linear", "cat") or self.on_factors:
            for _, adapter in own:
                if adapter.padded:
                    raise UnsupportedFeatureError(
                        f"The factors of adapter {adapter.name!r} are padded with zeros, since another rank was hot "
                        f"swapped in; combination_type {self.kind!r} works on factors. Use 'svd', or load the adapter "
                        "under a name of its own."
                    )
        if self.on_factors and len({adapter.r for _, adapter in own}) > 1:
            ranks = ", ".join(f"{adapter.name}: {adapter.r}" for _, adapter in own)
            raise ConfigError(
                f"All adapters must have the same r value when using combination_type {self.kind!r}, but on '{path}' "
                f"they have {ranks}. Use 'svd', 'cat' or a type that ends in '_svd'."
            )

    def __call__(self, tensors: list[Tensor], weights: list[float]) -> Tensor:
        """The combination of `tensors` with weights >= 0; negative ones count for the tensor."""
        tensors = [-t if w < 0 else t for t, w in zip(tensors, weights)]
        w = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device).abs()
        return FUNCTIONS[self.name](tensors, w, **self.options)

    def fill(self, new: Any, own: list[tuple[float, Any]]) -> None:
        """Set A, B and the bias of B of `new` from adapters `own` of the same layer, with their weights."""
        A, B = _values(new.lora_A), _values(new.lora_B)
        with ExitStack() as stack:
            for _, adapter in own:
                stack.enter_context(upcast(adapter))
            scales = [w * adapter.scaling for w, adapter in own]
            As, Bs = ([_values(f) for f in fs] for fs in zip(*((a.lora_A, a.lora_B) for _, a in own)))
            if self.on_factors:
                roots = [math.sqrt(abs(c)) for c in scales]
                A.copy_(self(As, [math.copysign(root, c) for root, c in zip(roots, scales)]))
                B.copy_(self(Bs, roots))
            elif self.kind == "cat":
                g = getattr(new.base.leaf, "groups", 1)  # each group of a convolution has rows of A of its own
                a = torch.cat([c * t.unflatten(0, (g, -1)) for c, t in zip(scales, As)], 1)  # (g, r / g, in, ...)
                b = torch.cat(Bs, 1)  # (out, r / g, ...)
                A.zero_().unflatten(0, (g, -1))[:, : a.shape[1]] = a
                B.zero_()[:, : b.shape[1]] = b
            else:
                base = new.base
                deltas = [base.canonical(a.delta()) for _, a in own]  # as stored, so that DARE draws what PEFT draws
                D = base.canonical(self(deltas, [w for w, _ in own])).flatten(1)  # (out, in)
                a, b = truncate(D, len(A), **self.svd)
                A.zero_().flatten(1)[: len(a)] = a
                B.zero_().flatten(1)[:, : len(a)] = b
            if new.lora_bias:
                biases = [(w, a.scaling * a.lora_B.bias.data) for w, a in own if a.lora_bias]
                new.lora_B.bias.data.copy_(self([b for _, b in biases], [w for w, _ in biases]) if biases else 0)


def truncate(D: Tensor, r: int, clamp: float | None, full_matrices: bool, driver: str | None) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k) with B A the closest matrix of rank k = min(r, out, in) to D (out, in)."""
    if clamp is not None and not 0 <= clamp <= 1:
        raise ConfigError(f"`svd_clamp` is a quantile and must lie between 0 and 1, got {clamp}.")
    if driver is not None and not D.is_cuda:
        raise ConfigError(f"`svd_driver` is for weights on a CUDA device only, got {driver!r}.")
    U, S, Vh = torch.linalg.svd(D, full_matrices=full_matrices, driver=driver)
    k = min(r, len(S))
    A, B = Vh[:k], U[:, :k] * S[:k]
    if clamp is not None:
        bound = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp).abs()
        A, B = A.clamp(-bound, bound), B.clamp(-bound, bound)
    return A, B


def _values(factor: Any) -> Tensor:
    return getattr(factor, "weight", factor).data
