"""LoRA factors with zeros behind them, as hot swapping makes them: how saving and loading see them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ...core.layer import Layer
from ...core.state import Entry, strip

RANK_OF = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}  # the dimension of each factor


def layer_of(entry: Entry) -> Any:
    """The layer that the entry of a LoRA tensor is on."""
    return entry.layer


def slot_of(key: str) -> str:
    """Which factor a live key means, or an empty string."""
    return next((slot for slot in RANK_OF if f".{slot}." in f"{key}."), "")


def groups_of(layer: Layer) -> Any:
    """In how many parts the rows of A are, each of which has its own rank: groups of a convolution, or experts."""
    base: Any = layer.base
    return getattr(base, "experts", None) or getattr(base.leaf, "groups", 1)


def pad(W: Tensor, size: int, dim: int, groups: int) -> Tensor:
    """W with zeros behind it along `dim`, or cut to `size`; with groups, each group's part of it."""
    parts = W.unflatten(dim, (groups, -1))  # (..., groups, r / groups, ...)
    sized = W.new_zeros(*parts.shape[: dim + 1], size // groups, *parts.shape[dim + 2 :])
    both = min(size // groups, parts.shape[dim + 1])
    sized.narrow(dim + 1, 0, both).copy_(parts.narrow(dim + 1, 0, both))
    return sized.flatten(dim, dim + 1)


def refit(entries: Iterable[Entry], name: str, tensors: dict[str, Tensor], zeros: bool) -> None:
    """Put `zeros` behind factors of a checkpoint where hot swapping has done so in the model, or take them away."""
    given = {strip(key): key for key in tensors}
    for entry in entries:
        key, slot = given.get(strip(entry.saved)), slot_of(entry.live)
        shapes = layer_of(entry).adapters[name].padded if slot and entry.layer is not None else {}
        if key is None or slot not in shapes:
            continue
        now, wanted = (shapes[slot], entry.tensor.shape) if zeros else (entry.tensor.shape, shapes[slot])
        if tensors[key].shape == now:
            dim = RANK_OF[slot]
            tensors[key] = pad(tensors[key], wanted[dim], dim, 1 if dim else groups_of(layer_of(entry)))
