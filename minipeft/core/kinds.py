"""Which kind of layer a module is."""

from __future__ import annotations

from typing import Any

from torch import nn

from .bases import OWN_KINDS, Attention, Base, Conv, Conv1D, Embedding, Linear, Param, Whole
from .computed import plain_class
from .quantised import quantised


def base_of(module: Any, parameter: str | None = None, whole: type[Whole] | None = None) -> Base | None:
    """The operator for a module (or for its parameter of that name), or None when its kind is unknown.

    `whole`: Whole or Block, to take it for that whatever it is.
    """
    inside = getattr(module, "base", None) if "base_layer" in module._modules else None
    leaf = module
    while "base_layer" in leaf._modules:
        leaf = leaf.base_layer
    if parameter is not None:
        base = Param.__new__(Param)
        Param.__init__(base, module, inside, parameter)
        return base
    if whole is not None:
        return whole(module, inside)
    kind = next((OWN_KINDS[cls] for cls in type(leaf).__mro__ if cls in OWN_KINDS), None) or quantised(leaf)
    if kind is None:
        if isinstance(leaf, nn.Linear):
            kind = Linear
        elif isinstance(leaf, nn.Embedding):
            kind = Embedding
        elif isinstance(leaf, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            kind = Conv
        elif isinstance(leaf, nn.MultiheadAttention):
            kind = Attention
        elif plain_class(leaf).__name__ == "Conv1D" and getattr(getattr(leaf, "weight", None), "ndim", 0) == 2:
            kind = Conv1D
        else:
            return None
    return kind(module, inside)
