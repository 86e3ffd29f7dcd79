"""Several adapters combined into one: functions on task tensors, and the steps that every method's combination shares.

A task tensor is what training added: a delta, or a factor of one. n task tensors of one shape and n weights give one
tensor of that shape.

    task arithmetic    sum of w_i t_i                          Ilharco et al., 2023, https://arxiv.org/abs/2212.04089
    TIES               keep the largest of each t_i, elect a sign for each entry, average w_i t_i over those that agree
                                                               Yadav et al., 2023, https://arxiv.org/abs/2306.01708
    DARE               keep random entries of each t_i, rescaled; then either of these two
                                                               Yu et al., 2024, https://arxiv.org/abs/2311.03099

`density` is the share of entries that is kept, from 0 to 1.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.boxes import LOW_PRECISION
from ...core.errors import AdapterNameError, ConfigError, MergeError, PeftWarning, UnsupportedFeatureError
from ...core.layer import Layer, layers
from ...model.plan import ModelPlan


# ------------------------------------------------------------------------------------------------------ task tensors
def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """`weights` (n,) as (n, 1, ...), to be multiplied with `task_tensors` (n, ...)."""
    return weights.reshape(*weights.shape, *[1] * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with all but the largest int(density * numel) entries, by absolute value, set to zero."""
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    keep = torch.zeros_like(tensor).flatten().index_fill_(0, largest, 1)
    return tensor * keep.view_as(tensor)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """`tensor` with each entry kept with probability `density`; with `rescale` divided by it, which keeps the mean."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """`tensor` with a share `density` of its entries, the largest ones or random ones, and zeros elsewhere.

    A density of 1 or more keeps everything, with a warning. Raises `ConfigError` for others that cannot work.
    """
    if method not in ("magnitude", "random"):
        raise ConfigError(f"The pruning method must be 'magnitude' or 'random', got {method!r}.")
    if density >= 1:
        warnings.warn(f"With density {density} nothing is pruned.", PeftWarning, stacklevel=2)
        return tensor
    if not density >= 0 or (density == 0 and method == "random" and rescale):
        raise ConfigError(f"Density should be >= 0, and > 0 where the kept entries are rescaled, got {density}.")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    return random_pruning(tensor, density, rescale)


def calculate_majority_sign_mask(tensor: Tensor, method: Literal["total", "frequency"] = "total") -> Tensor:
    """Where the task tensors (n, ...) have the elected sign: that of their sum ("total") or of most ("frequency")."""
    if method not in ("total", "frequency"):
        raise ConfigError(f"The majority sign method must be 'total' or 'frequency', got {method!r}.")
    votes = tensor if method == "total" else tensor.sign()
    elected = (votes.sum(0) >= 0) * 2 - 1
    return tensor.sign() == elected


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean over those of the task tensors (n, ...) that the mask keeps; zero where it keeps none."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def _weighted(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    stacked = torch.stack(list(task_tensors))
    return stacked * reshape_weight_task_tensors(stacked, weights)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """Sum of the weighted task tensors; `weights` (n,)."""
    return _weighted(task_tensors, weights).sum(0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The same, of the largest entries of each."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The same, of random entries of each, rescaled."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def _elected(task_tensors: list[Tensor], weights: Tensor, method: Any) -> Tensor:
    mask = calculate_majority_sign_mask(torch.stack(task_tensors), method)
    return disjoint_merge(_weighted(task_tensors, weights), mask)


def ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """TIES: prune by magnitude, elect signs (before weighting), and average the weighted entries that agree."""
    return _elected([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """The same, pruned at random."""
    kept = [prune(t, density, "random", rescale=True) for t in task_tensors]
    return _elected(kept, weights, majority_sign_method)


# ------------------------------------------------------------------------------------------------ adapters of a model
Parts = dict[Layer, list[tuple[float, Any]]]  # for each layer its own among the adapters, each with its weight
UNMIXABLE = ("target_parameters", "modules_to_save", "trainable_token_indices")


def parts_of(tuner: Any, adapters: Any, weights: Any) -> Parts:
    """What is to be combined. Raises `PeftError` for requests that make no sense or lose something."""
    if isinstance(adapters, str) or not adapters:
        raise ConfigError(f"`adapters` must be a list of adapter names, got {adapters!r}.")
    for name in adapters:
        if name not in tuner.peft_config:
            raise AdapterNameError(f"Adapter {name} does not exist; this model has {sorted(tuner.peft_config)}.")
    weights = [float(w) for w in weights]
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ConfigError(f"`weights` must be {len(adapters)} finite numbers, one for each adapter, got {weights}.")
    for name in adapters:
        config = tuner.peft_config[name]
        for field in UNMIXABLE:
            if getattr(config, field, None):
                raise UnsupportedFeatureError(
                    f"Adapters with `{field}` cannot be combined (adapter {name!r}): it does not add to the weights."
                )
        if getattr(config, "bias", "none") != "none":
            raise UnsupportedFeatureError(f"Adapters that train biases cannot be combined (adapter {name!r}).")
    parts: Parts = {}
    for layer in layers(tuner.model):
        if found := [(w, layer.adapters[name]) for name, w in zip(adapters, weights) if name in layer.adapters]:
            parts[layer] = found
    return parts


def plan_union(
    tuner: Any, name: str, adapters: Sequence[str], parts: Parts, fits: Any, fields: Any, **changes: Any
) -> ModelPlan:
    """A new adapter on exactly the layers of `parts`, configured as the first of `adapters` but for `changes`.

    Each of `fields` (targets) becomes the union of the adapters' own. Where that would mean other layers, or new
    adapters for which `fits(new, own)` is false, it becomes a regular expression for the paths of those layers for
    which `fields[field](own)` is true.
    """
    configs = [tuner.peft_config[n] for n in adapters]

    def plan(**targets: Any) -> tuple[ModelPlan, bool]:
        planned = ModelPlan(tuner, name, replace(configs[0], **targets, **changes), autocast=True)
        found: dict[Any, Any] = {joins: scratch.adapters[name] for _, scratch, joins in planned.new}
        same = found.keys() == parts.keys()
        return planned, same and all(fits(found[layer], parts[layer]) for layer in parts)

    union = {field: _union([getattr(c, field) for c in configs]) for field in fields}
    if None not in union.values():
        planned, right = plan(**union)
        if right:
            return planned
        planned.abort()
    exact: dict[str, Any] = {}
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(configs[0], field):
            exact[field] = None
    for field, keeps in fields.items():
        exact[field] = "|".join(sorted({re.escape(own[0][1].path) for own in parts.values() if keeps(own)}))
    planned, right = plan(**exact)
    if not right:
        planned.abort()
        raise ConfigError(f"No targets could be found that mean exactly the layers of adapters {', '.join(adapters)}.")
    return planned


def _union(targets: list[Any]) -> Any:
    """All that `targets` mean: sets joined, regular expressions as alternatives; None for a mixture."""
    if all(isinstance(t, str) for t in targets):
        return "|".join(f"({t})" for t in targets)
    return None if any(isinstance(t, str) for t in targets) else set().union(*targets)


def accept(plan: ModelPlan, parts: Parts) -> None:
    """Put the planned adapter into the model, frozen and not active, in 32 bits where one of `parts` has them.

    Raises `MergeError` if a number is not finite.
    """
    wide = any(p.dtype not in LOW_PRECISION for own in parts.values() for _, a in own for p in a.parameters())
    tensors = {entry.saved: entry.tensor for entry in plan.entries()}
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise MergeError(f"Combining gives numbers that are not finite, for example in '{broken[0]}'; nothing changed.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever there is to say was said when it was planned
        plan.tuner.add(plan.name, plan.config, autocast=wide, weights=tensors)
