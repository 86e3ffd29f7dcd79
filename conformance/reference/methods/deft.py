"""DEFT: Kumar et al., 2025, https://arxiv.org/abs/2509.22793; without R it is PaRa: https://arxiv.org/abs/2406.05641."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

NOT_64 = ("float32", "bfloat16")
ROUNDED = "the reference computes in float32 whatever the model's dtype"


def rank(site, c):
    return min(c["r"], site.out)


def shapes(site, c):
    found = {"deft_P": (site.out, rank(site, c))}
    return found if c.get("para") else {**found, "deft_R": (rank(site, c), site.W.shape[1])}


def pair(t, c):
    P = t["deft_P"]
    if c.get("decomposition_method", "relu") == "qr":
        Q = np.linalg.qr(P)[0]
        return Q, Q
    return P, np.maximum(P, 0)


def formula(site, t, c, scaled=True, side=1):
    left, right = pair(t, c)
    if side == 0:
        right = left
    W = site.W - left @ (right.T @ site.W)
    if not c.get("para"):
        W = W + (c["alpha"] / rank(site, c) if c.get("alpha") and scaled else 1) * left @ t["deft_R"]
    return W, site.b


def raw_columns(site, t, c):
    return formula(site, t, {**c, "decomposition_method": "relu"})


def deft(r=3, **more):
    return {"r": r, "target_modules": ["up", "mid"], **more}


QR = ("linear/qr", "linear/para-qr")
ROWS = [
    Row("linear/plain", "mlp", deft(), "core", dtypes=NOT_64, note=ROUNDED),
    Row("linear/qr", "mlp-tokens", deft(decomposition_method="qr"), "core", dtypes=NOT_64, note=ROUNDED),
    Row("linear/alpha", "mlp", deft(alpha=9), "core", dtypes=NOT_64, note=ROUNDED),
    Row("linear/para", "mlp", deft(para=True), dtypes=NOT_64, note=ROUNDED),
    Row("linear/para-qr", "mlp-nobias", deft(para=True, decomposition_method="qr"), dtypes=NOT_64, note=ROUNDED),
    Row("linear/modules-to-save", "mlp", deft(modules_to_save=["head"]), dtypes=NOT_64, note=ROUNDED),
    Row("conv1d-hf/plain", "gpt", deft(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core",
        dtypes=NOT_64, note=ROUNDED),
]

FAULTS = (
    Fault("relu-forgotten", "the projection is P P^T", {"formula": lambda s, t, c: formula(s, t, c, side=0)},
          spares=QR),
    Fault("not-orthonormal", "qr has no effect", {"formula": raw_columns}, cases=("linear/qr", "linear/para-qr")),
    Fault("alpha-ignored", "R is not scaled by alpha / r", {"formula": lambda s, t, c: formula(s, t, c, scaled=False)},
          cases=("linear/alpha",)),
    Fault("nothing-removed", "Q R is added to the whole W",
          {"formula": lambda s, t, c: (s.W if c.get("para") else s.W + pair(t, c)[0] @ t["deft_R"], s.b)}),
)


def fresh(site, t, c):
    """R such that nothing changes, where it is trained."""
    if "deft_R" not in t:
        return t
    unscaled = rank(site, c) / c["alpha"] if c.get("alpha") else 1
    return {**t, "deft_R": pair(t, c)[1].T @ site.W * unscaled}


METHOD = Method(
    name="deft", peft_type="DEFT", title="DEFT", paper="https://arxiv.org/abs/2509.22793",
    equation="W' = (I - Q P'^T) W + s Q R", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(fresh=fresh),
    laws=Laws(draw={"r": [1, 3], "decomposition_method": ["relu", "qr"], "alpha": [None, 4],
                    "target_modules": [["up", "mid"]]}, fresh_identity=True, stacks=False),
)
