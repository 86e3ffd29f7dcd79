"""EVA's search: the inputs of layers, batch by batch, until their components stay, and a rank for each layer."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.bases import Linear
from ...core.errors import ConfigError
from ...core.kinds import base_of
from ...core.layer import Layer
from ...core.state import PREFIX
from ...core.targets import linear_targets, pattern_value
from .eva_pca import IncrementalPCA


def linear_layers(model: Any, config: Any, adapter_name: str) -> dict[str, Any]:
    """The linear layers that the adapter is on, or would be, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    here = {name: m for name, m in layers.items() if adapter_name in m.adapters}
    found = {name: m for name, m in here.items() if isinstance(m.base, Linear) and not m.base.needs_weights}
    if not layers:
        found = {path: base.leaf for path, base in linear_targets(model, config).items()}
    if not found:
        raise ConfigError("The adapter has no linear layers, which is what EVA is for.")
    return found


class Watched:
    """A layer whose inputs are looked at while the model runs."""

    pca: IncrementalPCA
    handle: Any = None
    model_input: Any = None
    digest: bytes | None = None  # of its first inputs

    def __init__(self, name: str, module: nn.Module, prepare: Callable, gather: bool):
        self.name, self.module, self.prepare, self.gather = name, module, prepare, gather

    def start(self, take: Callable[[Tensor], None]) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            take(self.gathered(self.prepare(args, self.model_input, self.name)))

        self.handle = self.module.register_forward_hook(hook)

    def stop(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def gathered(self, x: Tensor) -> Tensor:
        """The vectors of all processes."""
        if not self.gather:
            return x
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, x.cpu())
        return torch.cat(parts).to(x.device)

    def note(self, x: Tensor) -> None:
        if self.digest is None:
            self.digest = hashlib.sha256(x.cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()

    def learn(self, x: Tensor) -> None:
        if len(x) >= self.pca.k:
            self.pca.update(x.float())


def search(watched: dict[str, Watched], dataloader: Any, run: Callable, config: Any, show: bool) -> dict[str, Tensor]:
    """Run batches until every layer's components that count have converged."""
    for layer in watched.values():
        layer.start(layer.note)
    run(next(iter(dataloader)))
    leaders: dict[Any, str] = {}
    leader = {name: leaders.setdefault(layer.digest, name) for name, layer in watched.items()}  # of equal inputs
    ranks = {name: pattern_value(config.rank_pattern, name.removeprefix(PREFIX), config.r) for name in watched}
    most: Counter[str] = Counter()  # components that are looked at
    for name, layer in watched.items():
        layer.stop()
        if layer.digest is None:
            raise ConfigError(f"'{name}' was not used when the model ran; leave it out of the target modules.")
        k = min(round(ranks[name] * config.eva_config.rho), base_of(layer.module).in_features)  # type: ignore[union-attr]
        most[leader[name]] = max(most[leader[name]], k)
    leading = {name: watched[name] for name in most}
    for name, layer in leading.items():
        layer.pca = IncrementalPCA(most[name], config.eva_config.tau)
    others = [name for first in leading for name in watched if leader[name] == first != name]
    order = [*leading, *others]
    counts = {name: most[leader[name]] for name in order}
    for step, inputs in enumerate(cycle(dataloader)):
        for name, layer in leading.items():
            if layer.pca.converged[: counts[name]].all():
                layer.stop()
            elif layer.handle is None:
                layer.start(layer.learn)
        waiting = sum(layer.handle is not None for layer in leading.values())
        if show:
            end = "" if waiting else "\n"
            print(f"\rEVA: {len(leading) - waiting}/{len(leading)} converged", end=end, file=sys.stderr, flush=True)
        if not waiting:
            break
        run(inputs)
        if few := [name for name, layer in leading.items() if layer.pca.V is None]:
            if step >= len(dataloader):
                need = f"{leading[few[0]].pca.k} vectors in a batch"
                raise ConfigError(f"'{few[0]}' needs {need} at least: use larger batches, or smaller `r` or `rho`.")
            continue
        counts = _shared_out({name: leading[leader[name]].pca.share for name in order}, sum(ranks.values()), leader)
    return {name: _matrix(leading[leader[name]].pca, counts[name], config.eva_config.whiten) for name in order}


def _shared_out(shares: dict[str, Tensor], budget: int, leader: dict[str, str]) -> dict[str, int]:
    """The rank of each layer, so that the `budget` largest shares of all layers are in; a leader has the most."""
    of, values = zip(*[(name, share) for name, own in shares.items() for share in own])
    found = Counter(of[i] for i in torch.stack(values).argsort(descending=True)[:budget].tolist())
    counts = {name: found[name] for name in shares}
    for name, first in leader.items():
        if counts[first] < counts[name]:
            counts[first], counts[name] = counts[name], counts[first]
    return counts


def _matrix(pca: IncrementalPCA, r: int, whiten: bool) -> Tensor:
    assert pca.V is not None
    return pca.V[:r] / pca.S[:r, None].sqrt() if whiten else pca.V[:r].clone()
