"""What is drawn for a case or a law: base weights, inputs, the adapter's tensors. All fit into 8 significant bits."""

from __future__ import annotations

import zlib

import numpy as np

from . import numpy_model, store
from .method import Method


def bf16(a):
    """Round to 8 significant bits, so that every dtype holds the value exactly."""
    bits = np.asarray(a, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def rng_of(text: str):
    return np.random.default_rng(zlib.crc32(text.encode()))


def draw_base(base, rng) -> dict:
    """Weights of a size that keeps activations near 1."""
    found = {}
    for name, shape in store.base_shapes(base).items():
        a = rng.normal(size=shape)
        if name.endswith("weight") and len(shape) > 1:
            a /= np.sqrt(np.prod(shape[1:])) if "emb" not in name else 1.0
        elif "norm" in name and name.endswith("weight"):
            a = 1 + 0.3 * a
        else:
            a *= 0.3
        found[name] = bf16(a)
    if base.get("tied"):
        found["head.weight"] = found["embed_tokens.weight"]
    return found


def draw_inputs(base, row_inputs, rng) -> dict:
    name = "input_ids" if base.get("model") in numpy_model.LANGUAGE_MODELS else "x"
    given = base["input"]
    below, shape = given.get("below"), given["shape"]
    if below:  # every index at least once, where there is room
        size = int(np.prod(shape))
        ids = np.concatenate([rng.permutation(below), rng.integers(0, below, size)])[:size]
        found = {name: rng.permutation(ids).reshape(shape)}
    else:
        found = {name: bf16(rng.normal(size=shape))}
    for extra, how in row_inputs.items():
        found[extra] = np.array(how["values"]) if isinstance(how, dict) else rng.integers(0, how[1], how[0])
    return found


def draw_adapter(method: Method, state: dict, frozen: set, rng) -> dict:
    """The adapter's tensors, each moved away from where training starts."""
    found = {}
    for key in sorted(state):
        fresh = np.asarray(state[key], np.float64)
        if key in frozen:
            found[key] = fresh if method.tensors.exact else bf16(fresh)
        elif method.tensors.perturb is not None:
            found[key] = bf16(method.tensors.perturb(key, fresh, rng))
        else:
            found[key] = bf16(fresh + 0.3 * rng.normal(size=fresh.shape))
    return found
