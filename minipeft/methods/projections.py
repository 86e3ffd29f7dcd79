"""Methods that multiply with a pair of random matrices, drawn from a seed and shared by all layers."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.adapter import Delta, adapter_class
from ..core.bases import Base
from ..core.config import PeftConfig, Size
from ..core.errors import CheckpointError, ConfigError, PeftWarning


@dataclass
class ProjectedConfig(PeftConfig):
    """The first fields of the methods with such a pair. All adapters of a model have the same seed."""

    r: Size = 256  # rank
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0  # seed of A and B
    save_projection: bool = True  # keep A and B in the checkpoint; otherwise the seed has to bring them back

    def __post_init__(self):
        super().__post_init__()
        cls: Any = adapter_class(self)
        warn_unless_saved(self, *cls.pair)


class Projected(Delta):
    """A delta made with the matrices A and B of the slots `pair`: of the largest layer's sizes, never trained."""

    shares = True
    pair: ClassVar[tuple[str, str]]
    with_layers: ClassVar[bool] = False  # True: each layer saves its view of them, too
    must_agree: ClassVar[tuple[str, ...]] = ("projection_prng_key", "save_projection")

    @classmethod
    def shapes(cls, config: Any, inp: int, out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A (rank first) and B (rank last) for layers of up to `inp` inputs and `out` outputs."""
        raise NotImplementedError

    @classmethod
    def draw(
        cls, config: Any, A: tuple[int, ...], B: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A and B, of these shapes."""
        return uniform(A, generator), uniform(B, generator)

    @classmethod
    def is_saved(cls, slot: str, config: Any) -> bool:
        return config.save_projection if slot in cls.pair else slot.startswith(cls.prefix)

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        most_in, most_out = max(b.in_features for _, b in found), max(b.out_features for _, b in found)
        shapes = cls.shapes(config, most_in, most_out)
        if not existing(cls.pair[0]):
            generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
            return dict(zip(cls.pair, cls.draw(config, *shapes, generator)))
        pair = [next(iter(existing(slot).values())) for slot in cls.pair]
        for slot, tensor, needs in zip(cls.pair, pair, shapes):
            if any(has < need for has, need in zip(tensor.shape, needs)):
                raise ConfigError(
                    f"{slot} has a size of {tuple(tensor.shape)} but {needs} or greater is required, "
                    "and the adapters of a model share it. Add the adapter with the larger rank or layers first."
                )
        A, B = pair
        rows, columns = shapes[0][0], shapes[1][-1]
        if (len(A), B.shape[-1]) != (rows, columns):
            A, B = A[:rows].clone(), B[..., :columns].clone()
        return dict(zip(cls.pair, (A, B)))

    @classmethod
    def views(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A and B again, by the keys that each layer's view of them has in a checkpoint, if it has any."""
        if not cls.with_layers:
            return {}
        ends = (key.rpartition(".") for key in tensors)
        layers = dict.fromkeys(path for path, _, slot in ends if slot.startswith(cls.prefix) and slot not in cls.pair)
        shared = {slot: tensors[f"base_model.{slot}"] for slot in cls.pair if f"base_model.{slot}" in tensors}
        return {f"{layer}.{slot}": shared[slot] for layer in layers for slot in shared}

    @classmethod
    def convert_for_save(cls, config: Any, name: str, tensors: dict[str, Tensor], entries: Any) -> dict[str, Tensor]:
        return tensors | cls.views(tensors)

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for view, whole in cls.views(tensors).items() if config.save_projection else ():
            if view not in tensors or not torch.equal(tensors[view], whole):
                same = f"'base_model.{view.rpartition('.')[2]}'"
                raise CheckpointError(f"'{view}' must be in the checkpoint and equal to {same}, but is not.")
        named = {key for key in tensors if key.rpartition(".")[2] in cls.pair}
        first: dict[str, str] = {}
        for key in sorted(named):  # of an adapter without a tuner there are only the layers'
            other = first.setdefault(key.rpartition(".")[2], key)
            if config.save_projection and not torch.equal(tensors[key], tensors[other]):
                raise CheckpointError(f"All layers share '{other}', so '{key}' must be equal to it, but is not.")
        views = {key for key in named if key.startswith("base_model.model.")}  # a layer's, of the one that is shared
        tensors = {key: t for key, t in tensors.items() if key not in views}
        own = {key: t for key, t in tensors.items() if key not in named}
        if config.save_projection or len(own) == len(tensors):
            return tensors
        warnings.warn(f"save_projection is False: the checkpoint's {' and '.join(cls.pair)} are not used.", PeftWarning)
        return own


def warn_unless_saved(config: Any, *slots: str, seed: str = "projection_prng_key") -> None:
    """Say what it means not to save the random tensors of these slots."""
    if not config.save_projection:
        warnings.warn(
            f"With save_projection=False, the checkpoint will lack {' and '.join(slots)}; "
            f"they are drawn again from {seed}, "
            "which may give other values on another system.",
            PeftWarning,
        )


def uniform(shape: tuple[int, ...], generator: torch.Generator, slope: float = 0.0, dtype: Any = None) -> Tensor:
    """Kaiming's uniform distribution for a leaky ReLU: variance 2 / (1 + slope^2) / entries of a row."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + slope**2)) / math.sqrt(math.prod(shape[1:])))
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
