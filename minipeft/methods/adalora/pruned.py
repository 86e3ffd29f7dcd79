"""Checkpoints of AdaLoRA: they hold the entries of E that pruning has left, and what of A and B goes with them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.state import PREFIX, Entry, strip
from ...core.tuner import tuner_of


def pruned(config: Any, name: str, tensors: dict[str, Tensor], entries: list[Entry]) -> dict[str, Tensor]:
    """A checkpoint's tensors: of A, E and B what `rank_pattern` leaves."""
    if config.rank_pattern is None:
        return tensors
    config.rank_pattern = {key.removesuffix(f".{name}"): left for key, left in config.rank_pattern.items()}
    tensors = dict(tensors)
    for key, left in config.rank_pattern.items():
        stem = next(p for p in (PREFIX, "model.", "") if p + key in tensors) + key.removesuffix("E")
        for slot, dim in (("E", 0), ("A", 0), ("B", 1)):
            if tensors[stem + slot].shape[dim] == len(left):
                index = torch.tensor(left, device=tensors[stem + slot].device).nonzero().flatten()
                tensors[stem + slot] = tensors[stem + slot].index_select(dim, index)
    return tensors


def take_ranks(model: nn.Module, name: str, tensors: dict[str, Tensor], entries: list[Entry]) -> Any:
    """Take the ranks of a checkpoint, which holds what pruning has left. Which entries those are is then past.

    Returns a function that undoes that.
    """
    given = {strip(key): tensor for key, tensor in tensors.items()}
    tuner, config = cast(Any, tuner_of(model) or model), cast(Any, model).peft_config[name]
    before: list[Any] = [(config, "rank_pattern", config.rank_pattern)]
    for stem, own in _factors(entries).items():
        adapter = cast(Any, own["E"].layer).adapters[name]
        found = {slot: given.get(strip(f"{stem}{slot}")) for slot in own}
        ranks = {None if t is None or t.dim() != 2 else t.shape[slot == "B"] for slot, t in found.items()}
        r = ranks.pop()
        if ranks or r is None or r == adapter.r or r > config.init_r:
            continue  # whatever is wrong will be said when it is loaded
        left = _pattern(config, strip(f"{stem}E"), name)
        if left is None or sum(left) != r:
            left = [index < r for index in range(config.init_r)]
        config.rank_pattern = {**(config.rank_pattern or {}), strip(f"{stem}E"): left}
        for slot, entry in own.items():
            shape = list(entry.tensor.shape)
            shape[slot == "B"] = r
            before += [(entry.tensor, field, getattr(entry.tensor, field)) for field in ("data", "grad")]
            entry.tensor.data, entry.tensor.grad = entry.tensor.new_empty(shape), None
        before.append((adapter, "r", adapter.r))
        adapter.r = r
    if len(before) > 1 and hasattr(tuner, "rankallocator"):
        ipt = tuner.rankallocator
        before += [(ipt, field, getattr(ipt, field)) for field in ("exp_avg_ipt", "exp_avg_unc")]
        ipt.reset_ipt()

    def undo() -> None:
        for owner, field, value in before:
            setattr(owner, field, value)

    return undo


def _factors(entries: list[Entry]) -> dict[str, dict[str, Entry]]:
    """Entries of E, A and B of each layer, by what their saved keys begin with."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        stem, slot = entry.saved[:-1], entry.saved[-1]
        if stem.endswith(".lora_") and slot in "EAB":
            found.setdefault(stem, {})[slot] = entry
    return found


def _pattern(config: Any, key: str, name: str) -> list[bool] | None:
    pattern = config.rank_pattern or {}
    return pattern.get(key, pattern.get(f"{key}.{name}"))
