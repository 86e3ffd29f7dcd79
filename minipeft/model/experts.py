"""LoRA on the experts of transformers' models by the names that their layers had before transformers 5.

An expert was three linear layers, and the router, `gate`, one more. Now a parameter holds one or two of the three for
all experts, (experts, out, in), and the router is a module of its own with a weight. As in peft, it follows that:

- a name of a former layer in `target_modules` means that parameter: it goes to `target_parameters`;
- where two layers became one parameter W = [W1; W2], their adapters A1, B1 and A2, B2 become A = [A1; A2], (2r, in),
  and B = diag(B1, B2), (2 out, 2r). So its rank is 2r, its alpha twice the alpha, which leaves the scaling as it was,
  and neither layer goes without the other;
- names have to be known: a regular expression or "all-linear" becomes the last segments of the paths that it means;
- a file with factors for each expert is read as the factors of the parameters. A has the ranks of the first expert
  first, (experts * r, in); B has all experts for the first rank first, (out, r * experts). Modules that only have
  another path now are found there.

Which models became what, and which of their keys, transformers says. It is asked only for models of its own, so it is
there already; before version 5 there is nothing to ask.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import PeftType
from ..core.errors import ConfigError
from ..core.kinds import base_of
from ..core.plan import of_transformers
from ..core.state import Entry, strip
from ..core.targets import ALL_LINEAR, Targets, all_linear
from ..core.walk import walk

FAMILIES = {  # former layer -> parameter; peft's tables. What became one parameter stands in its order there
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"
    },
}
STACKING = {"MergeModulelist", "Concatenate"}  # operations of transformers: stack experts, join layers


def changes(config: Any, model: nn.Module) -> Any:
    """transformers' module that knows what became of older models; None where it has nothing to say."""
    if config.peft_type != PeftType.LORA or not of_transformers(model):
        return None
    return sys.modules.get("transformers.conversion_mapping")


def last(path: str) -> str:
    return path.rpartition(".")[2]


# ------------------------------------------------------------------------------------------------------ configuration
def name_parameters(config: Any, model: nn.Module, model_type: str | None) -> None:
    """Let `config` name parameters in place of the layers that they were.

    Raises `ConfigError`, with nothing changed, for one of two layers that became one parameter.
    """
    if (known := changes(config, model)) is None:
        return
    alike = {"mixtral": "mixtral", **getattr(known, "_MODEL_TO_CONVERSION_PATTERN", {})}
    names = FAMILIES.get(alike.get(model_type or "", ""), {})
    targets, parameters = config.target_modules, config.target_parameters
    if not names or (targets is None and not parameters):
        return
    if isinstance(targets, str):
        targets = known_names(config, model, names)
        if not targets:
            return
    moved = {target: names[last(target)] for target in targets or () if last(target) in names}
    given = {last(target) for target in moved}
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for parameter in dict.fromkeys(moved.values()):
        layers = [layer for layer in names if names[layer] == parameter]
        if lacking := [layer for layer in layers if layer not in given]:
            raise ConfigError(
                f"Cannot target {', '.join(sorted(given & {*layers}))} without {', '.join(lacking)}: in this model "
                f"they are one parameter, {parameter}. Name all of them, or it in `target_parameters`."
            )
        if len(layers) > 1:
            pattern = rf".*\.{re.escape(parameter)}"
            ranks[pattern], alphas[pattern] = config.r * len(layers), config.lora_alpha * len(layers)
    config.target_modules = {target for target in targets or () if target not in moved}
    config.target_parameters = sorted({*(parameters or ()), *moved.values()})
    config.rank_pattern, config.alpha_pattern = ranks, alphas


def known_names(config: Any, model: nn.Module, names: Mapping[str, str]) -> set[str]:
    """The last segments of what a string in `target_modules` means, former layers beside their parameters included."""
    modules = [(path, module) for path, _, module in walk(model) if path]
    if config.target_modules.lower() == ALL_LINEAR:
        linear = all_linear(model, config.task_type, [(path, base_of(module)) for path, module in modules])
        return {*map(last, linear), *names}
    paths = [path for path, _ in modules]
    for path, module in modules:
        for parameter in module._parameters:
            paths += [f"{path}.{name}" for name in (parameter, *(n for n in names if names[n] == parameter))]
    targets = Targets(config)
    return {last(path) for path in paths if path in targets}


# ---------------------------------------------------------------------------------------------------------- checkpoint
def present_keys(
    config: Any, model: nn.Module, name: str, entries: Iterable[Entry], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A checkpoint's tensors, those of former layers as the tensors of adapter `name` that they became.

    `entries`: what the adapter has. Keys that are among them, that mean none of them, or that do not go together stay.
    """
    if (known := changes(config, model)) is None:
        return weights
    places: dict[tuple[str, str], str] = {}  # path of a layer or parameter, what stands behind it -> saved key
    for entry in entries:
        if entry.layer is not None:
            places[entry.layer.adapters[name].path, split(entry.saved)[1]] = strip(entry.saved)
    wanted, given = {*places.values()}, {*map(strip, weights)}
    former = [key for key in weights if ".lora_" in key and strip(key) not in wanted]
    if not former:
        return weights
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = known.get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, dict[Any, list[str]]] = {}  # saved key -> of each layer that it was, the keys, expert by expert
    for key in sorted(former, key=dot_natural_key):
        path, slot = split(key)
        path, pattern = rename_source_key(f"{path}.weight", renamings, converters)
        place = places.get((path, slot), places.get((path.removesuffix(".weight"), slot)))
        if place is not None and place not in given:
            found.setdefault(place, {}).setdefault(pattern, []).append(key)
    weights = dict(weights)
    for place, keys in found.items():
        converter = by_pattern.get(next(iter(keys)))
        patterns = [None] if converter is None else converter.source_patterns
        if keys.keys() - {*patterns}:
            continue  # said in two ways
        tensors = [[weights[key] for key in keys.get(pattern, ())] for pattern in patterns]
        if converter is None:
            value = tensors[0][0] if len(tensors[0]) == 1 else None
        else:
            value = stacked(tensors, ".lora_A." in place) if stacks(converter) else None
        if value is not None:
            for key in itertools.chain(*keys.values()):
                del weights[key]
            weights[place] = value
    return weights


def stacks(converter: Any) -> bool:
    """Whether one of transformers' converters makes a parameter of the weights of experts."""
    return {type(operation).__name__ for operation in converter.operations} <= STACKING


def split(key: str) -> tuple[str, str]:
    """The path in a key, and what of an adapter stands behind it."""
    path, _, slot = strip(key).rpartition(".lora_")
    return path, slot


def stacked(layers: list[list[Tensor]], of_A: bool) -> Tensor | None:
    """The factor of a parameter out of those of `layers`, expert by expert: A (r, in) or B (out, r).

    None if they do not go together.
    """
    shapes = {tensor.shape for experts in layers for tensor in experts}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or len({len(experts) for experts in layers}) != 1:
        return None
    if of_A:
        return torch.cat([torch.stack(experts) for experts in layers], dim=1).flatten(0, 1)
    return torch.stack([torch.block_diag(*expert) for expert in zip(*layers)], dim=-1).flatten(1)
