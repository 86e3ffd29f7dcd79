"""Layer replication: a deeper model whose repeated layers share their weights, each with an adapter of its own.

The map [[0, 4], [2, 5]] makes of layers 0..4 the sequence 0 1 2 3 2 3 4 (each range without its end).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ...core.errors import ConfigError

PLACES = (("layers",), ("encoder", "layer"), ("h",))  # of the layers in Llama-, BERT- and Falcon-like models


def replicate_layers(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> Callable[[], None] | None:
    """Replace the layers of `model` by the sequence that `layer_map` describes. Returns what undoes it, if it did.

    Raises `ConfigError` when the model has no list of layers where one is looked for, or a range lies outside it.
    """
    parent, name = _find(model)
    layers = getattr(parent, name)
    if getattr(layers, "replication", None) == list(map(list, layer_map)):
        return None  # done for an adapter before this one
    for start, end in layer_map:
        if not 0 <= start < end <= len(layers):
            have = len(layers)
            raise ConfigError(f"layer_replication has the range [{start}, {end}], but the model has {have} layers.")
    replicated: Any = nn.ModuleList()
    replicated.replication = list(map(list, layer_map))
    for start, end in layer_map:
        for index in range(start, end):
            shared = {id(p): p for p in layers[index].parameters()}  # deepcopy leaves these as they are
            layer = copy.deepcopy(layers[index], shared)
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = len(replicated)
            replicated.append(layer)
    config: Any = getattr(parent, "config", None) or getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    setattr(parent, name, replicated)
    if count is not None:
        config.num_hidden_layers = len(replicated)

    return functools.partial(_put_back, parent, name, layers, config, count)


def _put_back(parent: nn.Module, name: str, layers: nn.Module, config: Any, count: int | None) -> None:
    setattr(parent, name, layers)
    if count is not None:
        config.num_hidden_layers = count


def _find(model: Any) -> tuple[nn.Module, str]:
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    for *path, name in PLACES:
        parent = model
        for step in path:
            parent = getattr(parent, step, None)
        if isinstance(getattr(parent, name, None), nn.ModuleList):
            return parent, name
    raise ConfigError("layer_replication needs a model whose layers are at `layers`, `encoder.layer` or `h`.")
