"""Where each method drops what, in training: `DROPOUTS`, one line for each field of a config that sets a rate.

What is dropped is drawn, so no golden can be recorded. But a small layer leaves few choices of what to keep, and an
implementation has to give what the layer gives under one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .method import Method
from .numpy_model import apply_layer


@dataclass(frozen=True)
class Dropout:
    method: str
    rate: str  # the config's field
    # "input": what the adapter reads of x, entry by entry, kept ones divided by 1 - rate; "rows" of the weight's
    # change, drawn once for a call, and divided by the share that is kept; "all" of the change, or nothing; "blocks"
    # of a rotation, `rate` of them exactly, by setting them to 0 in the tensor `slot`
    drops: str
    more: dict = field(default_factory=dict)  # the config besides
    slot: str = ""
    undropped: str = ""  # a slot: set to 0, it leaves the part of the change that reads the whole input
    scaled: bool = True  # are kept rows divided at all?
    convolutions: bool = False  # has the method layers for them that drop, too?
    apart: str = ""  # a slot: what is left of the change when it is 0, and what it adds, drop by draws of their own


DROPOUTS = (
    Dropout("lora", "lora_dropout", "input", convolutions=True),
    Dropout("dora", "lora_dropout", "input", convolutions=True),
    Dropout("bdlora", "lora_dropout", "input"),
    Dropout("velora", "lora_dropout", "input"),
    Dropout("adalora", "lora_dropout", "input", convolutions=True),
    Dropout("delora", "module_dropout", "input"),
    Dropout("deft", "deft_dropout", "input", undropped="deft_R"),
    Dropout("frod", "frod_dropout", "input"),
    Dropout("gralora", "gralora_dropout", "input", {"hybrid_r": 0}),
    Dropout("gralora", "gralora_dropout", "input", {"hybrid_r": 3}, apart="gralora_B_general.weight"),
    Dropout("hira", "hira_dropout", "input", convolutions=True),
    Dropout("miss", "miss_dropout", "input"),
    Dropout("psoft", "psoft_dropout", "input"),
    Dropout("randlora", "randlora_dropout", "input"),
    Dropout("supertuning", "lora_dropout", "input", {"r": 2}, undropped="supertuning_lora_B.weight"),
    Dropout("tinylora", "tinylora_dropout", "input"),
    Dropout("unilora", "unilora_dropout", "input"),
    Dropout("vblora", "vblora_dropout", "input"),
    Dropout("vera", "vera_dropout", "input"),
    Dropout("loha", "rank_dropout", "rows"),
    Dropout("loha", "module_dropout", "all"),
    Dropout("lokr", "rank_dropout", "rows", {"rank_dropout_scale": True}),
    Dropout("lokr", "rank_dropout", "rows", {"rank_dropout_scale": False}, scaled=False),
    Dropout("lokr", "module_dropout", "all"),
    Dropout("oft", "module_dropout", "blocks", {"oft_block_size": 2, "block_share": False}, slot="oft_R.weight"),
    Dropout("boft", "boft_dropout", "blocks", {"boft_block_size": 2}, slot="boft_R"),
)
# Methods that draw in training under their defaults: the rate that is 0 where they do not (none: they always do)
NOISY: dict[str, dict] = {"monteclora": {}, "poly": {}, "pvera": {}, "shadow": {"shadow_dropout": 0.0},
                          "xlora": {"xlora_dropout_p": 0.0}}
OTHER_GRADIENTS = ("velora",)  # methods whose gradients are not the formula's in training: from compressed activations


def of(method: Method) -> list[Dropout]:
    return [d for d in DROPOUTS if d.method == method.name]


def places_of_input(site, x) -> tuple:
    """The shape of what a choice of the input's entries is made of: a token, or a whole sample of a convolution."""
    return x.shape[1:] if site.kernel else x.shape[-1:]


def choices(d: Dropout, site, t: dict, rate: float, x) -> np.ndarray:
    """Every choice of what is kept (1) and dropped (0), one a row."""
    if d.drops == "blocks":
        n = int(np.prod(places(t[d.slot])))
        return np.array([[0.0 if i in dropped else 1.0 for i in range(n)]
                         for dropped in itertools.combinations(range(n), int(rate * n))])
    size = {"input": int(np.prod(places_of_input(site, x))), "rows": site.out, "all": 1}[d.drops]
    found = list(itertools.product([1.0, 0.0], repeat=size))
    return np.array(found[:-1] if d.drops == "rows" else found)  # with no row kept there is no share to divide by


def output(d: Dropout, formula: Callable, site, t: dict, c: dict, x, keep) -> np.ndarray:
    """The layer's output where `keep` is kept: one of the rows of `choices`, or one for each token or sample."""
    if d.drops == "blocks":
        return apply_layer(site, x, *formula(site, {**t, d.slot: t[d.slot] * keep.reshape(places(t[d.slot]))}, c))
    W, b = formula(site, t, c)
    unchanged = formula(site, {**t, d.undropped: 0 * t[d.undropped]}, c)[0] if d.undropped else site.W
    change = W - unchanged
    if d.drops == "input":
        keep = keep.reshape(*keep.shape[:-1], *places_of_input(site, x))
        return apply_layer(site, x, unchanged, b) + apply_layer(site, x * keep / (1 - c[d.rate]), change, None)
    if d.drops == "rows":
        keep = keep[:, None] / (keep.mean() if d.scaled else 1)
    return apply_layer(site, x, unchanged + change * keep, b)


def parts(d: Dropout, formula: Callable, site, t: dict, c: dict, x) -> list[np.ndarray]:
    """What the adapter adds to the layer's output, under each of the choices; an array for each draw of its own."""
    kept = choices(d, site, t, c[d.rate], x)

    def added(t):
        return np.stack([output(d, formula, site, t, c, x, keep) for keep in kept]) - apply_layer(site, x)

    if not d.apart:
        return [added(t)]
    first = added({**t, d.apart: 0 * t[d.apart]})
    return [first, added(t) - first]


def places(blocks) -> tuple:
    """The shape of a choice of blocks, as it is multiplied with their tensor."""
    kept = blocks.shape[:-2] if blocks.ndim > 2 else blocks.shape[:-1]
    return (*kept, *[1] * (blocks.ndim - len(kept)))
