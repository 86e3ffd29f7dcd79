"""GraLoRA: Jung et al., 2025, https://arxiv.org/abs/2505.20355."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def shapes(site, c):
    k, r, h = c.get("gralora_k", 2), c.get("r", 32), c.get("hybrid_r", 0)
    found = {"gralora_A": (k, site.inp // k, r), "gralora_B": (k, r, site.out // k)}
    return found | ({"gralora_A_general.weight": (h, site.inp), "gralora_B_general.weight": (site.out, h)} if h else {})


def blocks(site, t, exchange=True):
    """The k x k blocks: block (j, i) is made of the j-th part of A_i and the i-th part of B_j."""
    A, B = t["gralora_A"], t["gralora_B"]
    k, size = len(A), A.shape[2] // len(A)
    a = A.reshape(k, -1, k, size)  # (i, in / k, j, r / k)
    b = B.reshape(k, k, size, -1)  # (j, i, r / k, out / k)
    return np.block([[(a[i, :, j if exchange else i] @ b[j, i if exchange else j]).T for i in range(k)]
                     for j in range(k)])


def general(t):
    return t["gralora_B_general.weight"] @ t["gralora_A_general.weight"] if "gralora_A_general.weight" in t else 0


def scaling(c):
    return c.get("alpha", 64) / (c.get("r", 32) + c.get("hybrid_r", 0))


def formula(site, t, c):
    return site.W + scaling(c) * (blocks(site, t) + general(t)), site.b


def gralora(**more):
    return {"r": 4, "alpha": 6, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", gralora(), "core", second=gralora(r=2)),
    Row("linear/four", "mlp-even", gralora(gralora_k=4), "core"),
    Row("linear/one", "mlp-tokens", gralora(gralora_k=1, r=3)),
    Row("linear/hybrid", "mlp-even-tokens", gralora(hybrid_r=3, gralora_k=4), "core"),
    Row("linear/no-base-bias", "mlp-nobias", gralora(r=2)),
    Row("linear/modules-to-save", "mlp", gralora(modules_to_save=["head"])),
    Row("conv1d-hf/plain", "gpt", gralora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core"),
]

FAULTS = (
    Fault("parts-not-exchanged", "each block takes the parts of A and B in their own order",
          {"formula": lambda s, t, c: (s.W + scaling(c) * (blocks(s, t, False) + general(t)), s.b)},
          spares=("linear/one",)),
    Fault("hybrid-rank-not-counted", "the scale is alpha / r also beside a plain pair",
          {"formula": lambda s, t, c: (s.W + c["alpha"] / c["r"] * (blocks(s, t) + general(t)), s.b)},
          cases=("linear/hybrid",)),
    Fault("plain-pair-ignored", "the plain pair is left out",
          {"formula": lambda s, t, c: (s.W + scaling(c) * blocks(s, t), s.b)}, cases=("linear/hybrid",)),
)

METHOD = Method(
    name="gralora", peft_type="GRALORA", title="GraLoRA", paper="https://arxiv.org/abs/2505.20355",
    equation="W'_ji = W_ji + alpha / (r + h) B_ji A_ji", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"gralora_B": 0.0, "gralora_B_general.weight": 0.0}),
    laws=Laws(draw={"r": [2, 4], "alpha": [1, 8], "hybrid_r": [0, 3], "gralora_k": [1, 2],
                    "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
