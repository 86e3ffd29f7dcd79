"""BOFT: Liu et al., 2023, https://arxiv.org/abs/2311.06243, section 4.

The reference has more than one butterfly factor only with its CUDA kernel; elsewhere it silently takes one.
"""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def blocks(site, c):
    """(number, size) over a row of the weight."""
    n = site.W[0].size
    size, number = c.get("boft_block_size", 4), c.get("boft_block_num", 0)
    return (n // size, size) if size else (number, n // number)


def shapes(site, c):
    d, b = blocks(site, c)
    return {"boft_R": (1, d, b, b), "boft_s": (1, site.out) if site.kernel else (site.out, 1)}


def rotation(t, half=0.5):
    """diag(R_1 .. R_d), R_i = (I - Q_i)(I + Q_i)^-1."""
    d, b = t["boft_R"].shape[1:3]
    R, I = np.zeros((d * b, d * b)), np.eye(b)
    for i, A in enumerate(t["boft_R"][0]):
        Q = half * (A - A.T)
        R[i * b:(i + 1) * b, i * b:(i + 1) * b] = (I - Q) @ np.linalg.inv(I + Q)
    return R


def fold(site, R, s):
    return (s.reshape(-1, 1) * (site.W.reshape(site.out, -1) @ R.T)).reshape(site.W.shape), site.b


def formula(site, t, c):
    return fold(site, rotation(t), t["boft_s"])


def boft(**more):
    return {"boft_block_size": 4, "target_modules": ["up", "mid"], **more}


C = ["c1", "c2"]
EXACT = ("float64", "float32")  # the reference solves a linear system, which torch cannot in bfloat16
ROWS = [
    Row("linear/plain", "mlp-even", boft(), "core", second={}, dtypes=EXACT),
    Row("linear/by-number", "mlp-even-tokens", boft(boft_block_size=0, boft_block_num=2), "core", dtypes=EXACT),
    Row("linear/odd-blocks", "mlp", boft(boft_block_size=3, target_modules=["up"]), dtypes=EXACT),
    Row("linear/init-false", "mlp-even", boft(init_weights=False), dtypes=EXACT),
    Row("linear/modules-to-save", "mlp-even", boft(modules_to_save=["head"]), dtypes=EXACT),
    Row("conv2d/plain", "conv2d", boft(boft_block_size=6, target_modules=C), "core", dtypes=EXACT),
    Row("conv2d/one-by-one", "conv2d-1x1", boft(boft_block_size=4, target_modules=C), dtypes=EXACT),
]

FAULTS = (
    Fault("transposed", "rotates by R where R^T is meant",
          {"formula": lambda s, t, c: fold(s, rotation(t).T, t["boft_s"])}),
    Fault("bias-scaled", "the base bias is multiplied by s, too",
          {"formula": lambda s, t, c: (formula(s, t, c)[0], s.b * t["boft_s"].ravel())}),
    Fault("not-halved", "Q is A - A^T, not half of it",
          {"formula": lambda s, t, c: fold(s, rotation(t, 1.0), t["boft_s"])}),
    Fault("scale-ignored", "s is left out", {"formula": lambda s, t, c: fold(s, rotation(t), 0 * t["boft_s"] + 1)}),
)

METHOD = Method(
    name="boft", peft_type="BOFT", title="BOFT", paper="https://arxiv.org/abs/2311.06243",
    equation="W' = diag(s) W R^T, R = diag(R_1 .. R_d) from skew-symmetric Q_i", rows=ROWS, shapes=shapes,
    formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"boft_R": 0.0, "boft_s": 1.0}),
    laws=Laws(draw={"boft_block_size": [2, 4], "target_modules": [["up", "mid"]]}, mixed_batch=True, stacks=False,
              bases=("mlp-even-tokens",)),
)
