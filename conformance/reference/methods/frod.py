"""FRoD: Wan et al., 2025, https://arxiv.org/abs/2512.23485: a weight in a basis that layers of one role share."""

from typing import Any

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

SHARED = ("base_model.frod_V", "base_model.frod_s_indices", "base_model.frod_s_size")
ROLES = ("up", "mid", "head", "c_attn", "c_proj", "q_proj", "v_proj")
L, S = "frod_lambda_l", "frod_lambda_s_values"
SINGLE: dict[str, Any] = {
    "dtypes": ("float32", "bfloat16"), "note": "the reference computes U in float32 whatever the model's dtype"}


def role(path):
    """The layers that share V: those of one name in all blocks. The suite's models need no more than the last part."""
    return path.split(".")[-1]


def block(path):
    return int(path.split(".")[-2]) if "." in path else 0


def entries(n, c):
    """How many entries of S are set; at least one where any are wanted."""
    rate = c.get("sparse_rate", 0.01)
    return min(max(int(n * n * rate), rate > 0), n * n - n)


def shapes(site, c):
    return {L: (site.inp,), S: (entries(site.inp, c),)}


def shared(c, sites):
    found: dict[str, Any] = {}
    for s in sites:
        sizes = (s.inp, s.inp), (2, entries(s.inp, c)), (2,)
        found |= {f"{slot}.{role(s.path)}": size for slot, size in zip(SHARED, sizes)}
    return found


def basis(weights, alpha):
    """V: the higher-order generalised singular value decomposition; with too few rows the ordinary one."""
    rows = np.vstack(weights)
    if rows.shape[0] < rows.shape[1]:
        return np.linalg.svd(rows)[2].T
    Q, R = np.linalg.qr(rows)
    parts = np.split(Q, np.cumsum([len(W) for W in weights])[:-1])
    T = np.mean([np.linalg.inv(q.T @ q + alpha * np.eye(len(R))) for q in parts], 0)
    return R.T @ np.linalg.eigh(T)[1]


def made(c, sites):
    """The shared tensors of a new adapter. Which entries of S are set is up to chance; here, the first."""
    found: dict[str, Any] = {}
    for name in {role(s.path) for s in sites}:
        own = sorted((s for s in sites if role(s.path) == name), key=lambda s: block(s.path))
        n = own[0].inp
        off = np.argwhere(~np.eye(n, dtype=bool))[: entries(n, c)].T
        values = basis([s.W for s in own], c.get("regularization_alpha", 1e-3)), off, np.array([n, n])
        found |= {f"{slot}.{name}": value for slot, value in zip(SHARED, values)}
    return found


def split(site, V):
    """U and l with W = U diag(l) V^T, the columns of U of length 1."""
    B = np.linalg.solve(V, site.W.T).T
    return B / np.linalg.norm(B, axis=0), np.linalg.norm(B, axis=0)


def formula(site, t, c, frozen=None, orthogonal=False, turned=False, raw=False, still=False):
    V, at, _ = (t[f"{slot}.{role(site.path)}"] for slot in SHARED)
    W = frozen or site
    U, l = split(W, V)
    if orthogonal:
        U = W.W @ V / np.linalg.norm(W.W @ V, axis=0)
    if raw:
        U = U * l
    M = np.diag(l if still else t[L])
    i, j = at.astype(int)[::-1] if turned else at.astype(int)
    M[i, j] = t[S]
    return site.W + U @ M @ V.T - W.W, site.b


def fresh(site, t, c):
    return {L: split(site, t[f"{SHARED[0]}.{role(site.path)}"])[1]}


def frod(**more):
    return {"sparse_rate": 0.1, "target_modules": ["up", "mid"], "progressbar": False, **more}


ROWS = [
    Row("linear/plain", "mlp", frod(), "core", second={}, **SINGLE),
    Row("linear/no-base-bias", "mlp-nobias", frod(sparse_rate=0.3), **SINGLE),
    Row("linear/tokens", "mlp-tokens", frod(sparse_rate=0.5, projection_prng_key=5), "core", **SINGLE),
    Row("linear/all-entries", "mlp", frod(sparse_rate=1.0), **SINGLE),
    Row("linear/one-entry", "mlp", frod(sparse_rate=0.001), **SINGLE),
    Row("linear/fewer-rows", "mlp", frod(target_modules=["mid", "head"]), dtypes=("float32",),
        note="U has more columns than W has rows: the further ones are what rounding leaves of zero, at length 1"),
    Row("linear/modules-to-save", "mlp", frod(modules_to_save=["head"]), **SINGLE),
    Row("blocks/three", "blocks", frod(target_modules=["q_proj", "v_proj"]), "core", **SINGLE),
    Row("blocks/alpha", "blocks", frod(target_modules=["q_proj"], regularization_alpha=0.5), **SINGLE),
    Row("blocks/two", "blocks", frod(target_modules=["v_proj"], layers_to_transform=[0, 2]), **SINGLE),
    Row("conv1d-hf/plain", "gpt", frod(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), **SINGLE),
]


def wrong(**change):
    return {"formula": lambda s, t, c, frozen=None: formula(s, t, c, frozen, **change)}


FAULTS = (
    Fault("basis-taken-as-orthogonal", "U is made from W V instead of W V^-T", wrong(orthogonal=True)),
    Fault("s-transposed", "the entries of S stand at (column, row)", wrong(turned=True),
          spares=("linear/one-entry",)),
    Fault("u-not-normalised", "the columns of U keep their length, so l counts twice", wrong(raw=True),
          cases=("blocks/three", "blocks/alpha", "blocks/two")),
    Fault("l-not-trained", "l stays as it was at the start", wrong(still=True)),
)

FROZEN = tuple(f"{slot}.{name}" for slot in SHARED for name in ROLES)
METHOD = Method(
    name="frod", peft_type="FROD", title="FRoD", paper="https://arxiv.org/abs/2512.23485",
    equation="W' = U (S + diag(l)) V^T", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(shared=shared, made=made, frozen=FROZEN, unsaved=("save_projection", FROZEN),
                    exact=True, neutral={S: 0.0}, fresh=fresh,
                    perturb=lambda key, value, rng: value + 0.2 * rng.normal(size=value.shape)),
    laws=Laws(draw={"progressbar": [False], "sparse_rate": [0.05, 0.3], "regularization_alpha": [1e-3, 0.1],
                    "target_modules": [["up", "mid"]]}, fresh_identity=True),
)
