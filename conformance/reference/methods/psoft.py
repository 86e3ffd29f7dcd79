"""PSOFT: Wu et al., 2025, https://arxiv.org/abs/2505.11235: a rotation inside a weight's principal subspace.

A pair of singular vectors may have either sign, LAPACK builds differ in it, and no checkpoint holds them. R is relative
to them: with other signs D, the same adapter is D R D. `gauges` lists what that does to the saved numbers.
"""

from itertools import product
from typing import Any

import numpy as np

from ..method import KEY, Fault, Laws, Method, Row, Tensors

Q, BEHIND, BEFORE = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
SINGLE: dict[str, Any] = {"golden": "formula", "dtypes": ("float32", "bfloat16"),
                          "note": "the reference refuses float64 models; run in float32, it agrees with the golden"}


def orthogonal(c):
    return c.get("psoft_orth", True)


def shapes(site, c):
    r = c["r"]
    found = {Q: (r * (r - 1) // 2,) if orthogonal(c) else (r, r)}
    return found | {k: (r,) for k, field in ((BEHIND, "psoft_mag_b"), (BEFORE, "psoft_mag_a")) if c.get(field, True)}


def rotation(t, c, turned=False, angle=1.0, last=1.0, swapped=False, bounded=True):
    """R = diag(b) C diag(a)."""
    r = c["r"]
    C = t[Q]
    if orthogonal(c):
        skew = np.zeros((r, r))
        skew[np.triu_indices(r, 1)] = angle * t[Q]
        skew = skew.T - skew if turned else skew - skew.T
        bound = c.get("cayley_neumann_eps")
        if c.get("use_cayley_neumann"):
            if bounded and bound is not None and np.linalg.norm(skew) > bound:
                skew = skew * bound / np.linalg.norm(skew)
            terms = c.get("num_cayley_neumann_terms", 5)
            C = sum(2 * np.linalg.matrix_power(skew, k) for k in range(1, terms - 1)) + np.eye(r)
            if terms > 1:
                C = C + (2 if terms == 2 else last) * np.linalg.matrix_power(skew, terms - 1)
        else:
            C = (np.eye(r) + skew) @ np.linalg.inv(np.eye(r) - skew)
    elif turned:
        C = C.T
    b, a = t.get(BEHIND, np.ones(r)), t.get(BEFORE, np.ones(r))
    if swapped:
        b, a = a, b
    return b[:, None] * C * a


def formula(site, t, c, frozen=None, smallest=False, whole=False, other=False, **change):
    left, s, right = np.linalg.svd((frozen or site).W, full_matrices=False)
    r = c["r"]
    kept = slice(len(s) - r, None) if smallest else slice(r)
    moved = rotation(t, c, **change) - (0 if whole else np.eye(r))
    halves = (c.get("ab_svd_init", "psoft_init") == "pissa_init") != other
    share = np.sqrt(s[kept]) if halves else np.ones(r)  # of the singular values, what stands to the right of R
    return site.W + left[:, kept] * (s[kept] / share) @ moved @ (share[:, None] * right[kept]), site.b


def gauges(c, paths):
    """Signs of the singular vectors; the first may be kept, since all turned together change nothing."""
    r = c["r"]
    signs = [np.array((1, *rest)) for rest in product((1, -1), repeat=r - 1)]
    for chosen in product(signs, repeat=len(paths)):
        both = {path: np.outer(d, d) for path, d in zip(paths, chosen)}
        yield {f"{KEY}{path}.{Q}": m[np.triu_indices(r, 1)] if orthogonal(c) else m for path, m in both.items()}


def fresh(site, t, c):
    return {} if orthogonal(c) else {Q: np.eye(c["r"])}


def psoft(**more):
    return {"r": 3, "psoft_alpha": 3, "target_modules": ["up", "mid"], **more}


# With these draws, a decomposition in float32 moves outputs and gradients by a quarter of a tolerance.
ROWS = [
    Row("linear/plain", "mlp", psoft(), "core", second={}, draw="2", **SINGLE),
    Row("linear/no-base-bias", "mlp-nobias", psoft(r=4, target_modules=["mid"]), draw="6", **SINGLE),
    Row("linear/tokens", "mlp-tokens", psoft(psoft_alpha=5), "core", draw="102", **SINGLE),
    Row("linear/half-the-values-in-each", "mlp", psoft(ab_svd_init="pissa_init", psoft_alpha=8), draw="4", **SINGLE),
    Row("linear/no-vectors", "mlp", psoft(psoft_mag_a=False, psoft_mag_b=False), draw="17", **SINGLE),
    Row("linear/one-vector", "mlp", psoft(psoft_mag_a=False), draw="21", **SINGLE),
    Row("linear/unconstrained", "mlp", psoft(psoft_orth=False, psoft_mag_b=False), draw="8", **SINGLE),
    Row("linear/neumann", "mlp", psoft(use_cayley_neumann=True), "core", draw="16", **SINGLE),
    Row("linear/neumann-two-terms", "mlp", psoft(use_cayley_neumann=True, num_cayley_neumann_terms=2), draw="64",
        **SINGLE),
    Row("linear/neumann-bounded", "mlp", psoft(use_cayley_neumann=True, cayley_neumann_eps=0.3), draw="44", **SINGLE),
    Row("linear/modules-to-save", "mlp", psoft(modules_to_save=["head"]), draw="23", **SINGLE),
]
NEUMANN = tuple(row.id for row in ROWS if "neumann" in row.id)
VECTORS = ("linear/plain", "linear/no-base-bias", "linear/tokens", "linear/modules-to-save")


def wrong(**change):
    return {"formula": lambda s, t, c, frozen=None: formula(s, t, c, frozen, **change)}


FAULTS = (
    Fault("turned-the-other-way", "C is transposed", wrong(turned=True)),
    Fault("half-the-angle", "C = (I + Q / 2) (I - Q / 2)^-1", wrong(angle=0.5), spares=("linear/unconstrained",)),
    Fault("identity-stays", "R is added where R - I should be", wrong(whole=True)),
    Fault("smallest-values", "the subspace of the smallest singular values is turned", wrong(smallest=True)),
    Fault("values-on-the-other-side", "singular values all in B where they are to be shared, and shared where not",
          wrong(other=True)),
    Fault("vectors-swapped", "R = diag(a) C diag(b)", wrong(swapped=True), cases=VECTORS),
    Fault("last-term-twice", "the last term of the series has the factor 2 of the others", wrong(last=2.0),
          cases=("linear/neumann",)),
    Fault("not-bounded", "Q is not scaled down to cayley_neumann_eps", wrong(bounded=False),
          cases=("linear/neumann-bounded",)),
)

METHOD = Method(
    name="psoft", peft_type="PSOFT", title="PSOFT", paper="https://arxiv.org/abs/2505.11235",
    equation="W' = W + U_r S_r (diag(b) C diag(a) - I) V_r^T", rows=ROWS, shapes=shapes, formula=formula,
    faults=FAULTS,
    tensors=Tensors(gauges=gauges, neutral={Q: 0.0, BEHIND: 1.0, BEFORE: 1.0}, fresh=fresh),
    laws=Laws(draw={"r": [2, 3, 4], "psoft_alpha": [1, 4], "use_cayley_neumann": [False, True],
                    "target_modules": [["up", "mid"]]}),
)
