"""OSF: Nayak et al., 2025, https://arxiv.org/abs/2504.07097: only the small singular values are trained."""

import re
from typing import Any

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

U, S, V = (f"osf_svd_params.{name}_low" for name in "USV")
SINGLE: dict[str, Any] = {
    "dtypes": ("float32", "bfloat16"), "note": "the reference decomposes in float32 whatever the model's dtype"}


def frozen_rank(site, c):
    side = min(site.out, site.inp)
    k = c.get("effective_rank")
    for pattern, other in (c.get("rank_pattern") or {}).items():
        if re.search(pattern, site.path):
            k = other
            break
    return side // 2 if k is None else int(side * k) if isinstance(k, float) and k <= 1 else min(int(k), side)


def shapes(site, c):
    m = min(site.out, site.inp) - frozen_rank(site, c)
    return {U: (site.out, m), S: (m,), V: (m, site.inp)}


def formula(site, t, c, held=None, free=False, smallest=False):
    left, s, right = np.linalg.svd(site.W, full_matrices=False)
    k = frozen_rank(site, c)
    if held is not None and not free:  # what moves U and V along the frozen directions is no gradient
        high, wide = left[:, :k], right[:k]
        move, turn = t[U] - held[U], t[V] - held[V]
        t = {**t, U: held[U] + move - high @ (high.T @ move), V: held[V] + turn - turn @ wide.T @ wide}
    kept = slice(len(s) - k, None) if smallest else slice(k)
    return (left[:, kept] * s[kept]) @ right[kept] + (t[U] * t[S]) @ t[V], site.b


def fresh(site, t, c):
    """The singular triples behind the frozen ones."""
    left, s, right = np.linalg.svd(site.W, full_matrices=False)
    k = frozen_rank(site, c)
    return {U: left[:, k:], S: s[k:], V: right[k:]}


def added(site, t, c):
    return site.W + (t[U] * t[S]) @ t[V], site.b


def osf(**more):
    return {"effective_rank": 3, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", osf(), "core", **SINGLE),
    Row("linear/half", "mlp-tokens", osf(effective_rank=None), "core", **SINGLE),
    Row("linear/share", "mlp-nobias", osf(effective_rank=0.7), **SINGLE),
    Row("linear/all-but-one-layer", "mlp", osf(effective_rank=1.0, rank_pattern={"mid": 0.5}), **SINGLE),
    Row("linear/pattern", "mlp", osf(rank_pattern={"mi": 6, "up": 2}), **SINGLE),
    Row("linear/modules-to-save", "mlp", osf(modules_to_save=["head"]), **SINGLE),
]

FAULTS = (
    Fault("added", "the trained part is added to the whole W", {"formula": added}),
    Fault("keeps-the-smallest", "the smallest singular values are frozen",
          {"formula": lambda s, t, c, held=None: formula(s, t, c, held, smallest=True)}),
    Fault("not-projected", "gradients reach the frozen directions",
          {"formula": lambda s, t, c, held=None: formula(s, t, c, held, free=True)}, caught_by=("gradients",),
          gradient_only=True),
)

METHOD = Method(
    name="osf", peft_type="OSF", title="OSF", paper="https://arxiv.org/abs/2504.07097",
    equation="W' = U_high S_high V_high + U S V", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(fresh=fresh),
    laws=Laws(draw={"effective_rank": [1, 3, 0.5], "target_modules": [["up", "mid"]]}, fresh_identity=True,
              stacks=False),
)
