"""C3A: Chen et al., 2024, https://arxiv.org/abs/2407.19342, section 3, entry by entry."""

from typing import Any

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def block(site, c):
    patterns = c.get("block_size_pattern") or {}
    return next((b for key, b in patterns.items() if ("." + site.path).endswith("." + key)), c["block_size"])


def shapes(site, c):
    b = block(site, c)
    return {"c3a_kernel": (site.out // b, site.inp // b, b)}


def delta(site, t, c, sign=1):
    """Entry (k, l) of a block is entry l - k of its kernel, counted around."""
    b, D = block(site, c), np.empty(site.W.shape)
    for k in range(site.out):
        for l in range(site.inp):
            D[k, l] = t["c3a_kernel"][k // b, l // b, sign * (l - k) % b]
    return D


def formula(site, t, c):
    return site.W + delta(site, t, c) / site.inp, site.b


def c3a(b=4, **more):
    return {"block_size": b, "target_modules": ["up", "mid"], **more}


def perturb(key, fresh, rng):
    return fresh + 2 * rng.normal(size=fresh.shape)  # to be divided by the number of inputs


# The reference computes in float32 whatever the dtype, and its backward pass transposes the blocks by mistake.
FORMULA: dict[str, Any] = {
    "golden": "formula", "dtypes": ("float32", "bfloat16"), "note": "the reference's gradient by the input is that of "
    "the transposed blocks, which is no derivative of its output; the formula's derivative wins"}
ROWS = [
    Row("linear/plain", "mlp-even", c3a(), "core", **FORMULA),
    Row("linear/tokens", "mlp-even-tokens", c3a(init_weights="gaussian"), "core", **FORMULA),
    Row("linear/block-of-two", "mlp-even", c3a(2), "core", dtypes=("float32", "bfloat16"),
        note="blocks of two are symmetric up to order, so the reference's gradients are right"),
    Row("linear/block-of-one", "mlp-nobias", c3a(1), dtypes=("float32", "bfloat16")),
    Row("linear/pattern", "blocks", c3a(6, target_modules=["q_proj", "v_proj"], block_size_pattern={
        "0.q_proj": 3, "v_proj": 2}), **FORMULA),
    Row("linear/modules-to-save", "mlp-even", c3a(2, modules_to_save=["head"]), dtypes=("float32", "bfloat16")),
]

FAULTS = (
    Fault("transposed", "the kernel is a block's first column",
          {"formula": lambda s, t, c: (s.W + delta(s, t, c, -1) / s.inp, s.b)},
          spares=("linear/block-of-two", "linear/block-of-one", "linear/modules-to-save")),
    Fault("divided-by-block", "divided by the block size in place of the number of inputs",
          {"formula": lambda s, t, c: (s.W + delta(s, t, c) / block(s, c), s.b)}),
    Fault("divided-by-outputs", "divided by the number of outputs",
          {"formula": lambda s, t, c: (s.W + delta(s, t, c) / s.out, s.b)},
          cases=("linear/plain", "linear/tokens", "linear/block-of-two")),
)

METHOD = Method(
    name="c3a", peft_type="C3A", title="C3A", paper="https://arxiv.org/abs/2407.19342",
    equation="W' = W + C / in, C of circulant blocks", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(perturb=perturb, neutral={"c3a_kernel": 0.0}),
    laws=Laws(draw={"block_size": [1, 2, 4], "init_weights": [True], "target_modules": [["up", "mid"]]},
              mixed_batch=True, bases=("mlp-even-tokens",)),
)
