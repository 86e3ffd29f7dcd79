"""Lily: Zhong et al., 2024, https://arxiv.org/abs/2407.09946: a mixture of B, one for the whole batch.

No two layers of these rows share a tensor of their own: each has another name or shape.
"""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from ..numpy_model import apply_layer

A, B, ROUTER = "lily_A.weight", "lily_B.weight", "lily_router.weight"


def shapes(site, c):
    r, n = c["r"], c.get("num_B", 2)
    return {A: (r, site.inp), B: (n * r, site.out), ROUTER: (n, r)}


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def run(site, t, c, x, inputs, each=False, uniform=False, late=False):
    h = x @ t[A].T
    p = softmax(h @ t[ROUTER].T)
    mean = p.reshape(-1, p.shape[-1]).mean(0)
    if late:
        mean = softmax((h @ t[ROUTER].T).reshape(-1, p.shape[-1]).mean(0))
    if uniform:
        mean = np.full_like(mean, 1 / len(mean))
    parts = t[B].reshape(len(mean), -1, site.out)
    mixed = np.einsum("...e,ero->...ro", p, parts) if each else np.broadcast_to(
        np.einsum("e,ero->ro", mean, parts), (*x.shape[:-1], *parts.shape[1:]))
    return apply_layer(site, x) + c.get("scaling", 1.0) * np.einsum("...r,...ro->...o", h, mixed)


def lily(**more):
    return {"r": 3, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", lily(), "core"),
    Row("linear/tokens", "mlp-tokens", lily(num_B=3, r=2), "core"),
    Row("linear/scaled", "mlp-nobias", lily(scaling=0.5, num_B=4)),
    Row("linear/modules-to-save", "mlp-tokens", lily(modules_to_save=["head"])),
]

FAULTS = (
    Fault("each-vector-its-own", "every vector is given its own mixture",
          {"run": lambda s, t, c, x, i: run(s, t, c, x, i, each=True)}, caught_by=("forward",)),
    Fault("router-ignored", "all B count the same", {"run": lambda s, t, c, x, i: run(s, t, c, x, i, uniform=True)},
          caught_by=("forward",)),
    Fault("softmax-of-the-mean", "the logits are averaged, not the probabilities",
          {"run": lambda s, t, c, x, i: run(s, t, c, x, i, late=True)}, caught_by=("forward",)),
)


def perturb(key, fresh, rng):
    return fresh + rng.normal(size=fresh.shape)  # the router must have something to choose


METHOD = Method(
    name="lily", peft_type="LILY", title="Lily", paper="https://arxiv.org/abs/2407.09946",
    equation="y = W x + s sum_e p_e B_e A x, p = mean softmax(G A x)", rows=ROWS, shapes=shapes, run=run,
    faults=FAULTS, merges=False,
    tensors=Tensors(neutral={B: 0.0}, perturb=perturb),
    laws=Laws(draw={"r": [1, 2], "num_B": [2, 3], "target_modules": [["up", "mid"]]}, stacks=False, whole_batch=True),
)
