"""Arrow: Ostapenko et al., 2024, https://arxiv.org/abs/2405.11157: each token chooses among adapters that are there.

A token's likeness to an adapter is how far it points along the direction that the adapter's B A stretches most, either
way. Of the `top_k` likest, each counts by the softmax of its likeness. With `use_gks` the mean of general adapters,
factor by factor, is taken from each of the others first: Bagherifard et al., 2025,
https://aclanthology.org/2025.acl-short.54.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .method import slots
from .numpy_model import apply_layer, sites

A, B = "lora_A.weight", "lora_B.weight"


def likeness(x, V):
    """x: (..., in), V: (adapters, in) -> (..., adapters)."""
    return np.abs(x @ V.T)


def shares(like, options):
    """How much each adapter counts for each token: (..., adapters)."""
    least = np.sort(like, -1)[..., -options["top_k"], None]
    e = np.exp((like - like.max(-1, keepdims=True)) / options["router_temperature"])
    e = np.where(like >= least, e, 0)
    return e / e.sum(-1, keepdims=True)


def layer(site, x, adapters, general, scale, options, likeness=likeness):
    """x through one layer. `adapters`, `general`: the tensors that each has there."""
    As, Bs = ([np.asarray(t[slot], np.float64) - (np.mean([g[slot] for g in general], 0) if general else 0)
               for t in adapters] for slot in (A, B))
    V = np.stack([np.linalg.svd(b @ a)[2][0] for a, b in zip(As, Bs)])
    each = np.stack([x @ a.T @ b.T for a, b in zip(As, Bs)], -1)
    return apply_layer(site, x) + scale * (each @ shares(likeness(x, V), options)[..., None])[..., 0]


def route(adapters, general, config, options, likeness=likeness):
    """For `formulas.output`: {path: how an input goes through that layer}. `adapters`, `general`: all their tensors."""
    general = general if options.get("use_gks") else []
    scale = config["lora_alpha"] / config["r"]

    def routed(base, weights, *_):
        found = {}
        for path in sites(base, weights):
            here, there = ([slots(t, path) for t in some] for some in (adapters, general))
            if here[0]:
                found[path] = partial(layer, adapters=here, general=there, scale=scale, options=options,
                                      likeness=likeness)
        return found

    return routed
