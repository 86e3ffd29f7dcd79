"""HRA: Yuan et al., 2024, https://arxiv.org/abs/2405.17484, section 3.1, as a dense product of reflections."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def shapes(site, c):
    return {"hra_u": (site.W[0].size, c["r"])}


def reflections(U, c, factor=2.0, order=1):
    if c.get("apply_GS"):
        Q, _ = np.linalg.qr(U)  # the columns of Gram-Schmidt, up to signs that do not matter here
        return np.eye(len(U)) - factor * Q @ Q.T
    H = np.eye(len(U))
    for u in U.T[::order]:
        H = H @ (np.eye(len(U)) - factor * np.outer(u, u) / (u @ u))
    return H


def fold(site, H):
    return (site.W.reshape(site.out, -1) @ H).reshape(site.W.shape), site.b


def formula(site, t, c):
    return fold(site, reflections(t["hra_u"], c))


def hra(r=4, **more):
    return {"r": r, "target_modules": ["up", "mid"], **more}


def perturb(key, fresh, rng):
    return fresh + 0.3 * rng.normal(size=fresh.shape)


C = ["c1", "c2"]
GS = ("linear/gram-schmidt", "conv2d/gram-schmidt")
ROWS = [
    Row("linear/plain", "mlp", hra(), "core", second={}),
    Row("linear/odd", "mlp-tokens", hra(3), "core"),
    Row("linear/gram-schmidt", "mlp", hra(3, apply_GS=True, init_weights=False), "core"),
    Row("linear/no-base-bias", "mlp-nobias", hra(2)),
    Row("linear/modules-to-save", "mlp", hra(modules_to_save=["head"])),
    Row("conv2d/plain", "conv2d", hra(target_modules=C), "core"),
    Row("conv2d/one-by-one", "conv2d-1x1", hra(2, target_modules=C), dtypes=("float64", "float32"),
        note="merged in bfloat16, two reflections round by more than its tolerance"),
    Row("conv2d/gram-schmidt", "conv2d", hra(3, apply_GS=True, init_weights=False, target_modules=C)),
]

FAULTS = (
    Fault("order-reversed", "the last reflection stands next to W", spares=GS,
          change={"formula": lambda s, t, c: fold(s, reflections(t["hra_u"], c, order=-1))}),
    Fault("projected", "takes the component away once, where a reflection takes it twice",
          {"formula": lambda s, t, c: fold(s, reflections(t["hra_u"], c, 1.0))}),
    Fault("not-normalised", "the columns are not scaled to length 1",
          {"formula": lambda s, t, c: fold(s, np.linalg.multi_dot([np.eye(len(t["hra_u"]))] + [
              np.eye(len(u)) - 2 * np.outer(u, u) for u in t["hra_u"].T]))}, spares=GS),
    Fault("gram-schmidt-ignored", "apply_GS has no effect",
          {"formula": lambda s, t, c: formula(s, t, {**c, "apply_GS": False})}, cases=GS),
)

def fresh(site, t, c):
    """Every reflection twice, which is nothing, where their number is even."""
    U = t["hra_u"]
    odd = U.shape[1] % 2 or c.get("init_weights") is False
    return {"hra_u": U if odd else np.repeat(U[:, ::2], 2, 1)}


METHOD = Method(
    name="hra", peft_type="HRA", title="HRA", paper="https://arxiv.org/abs/2405.17484",
    equation="W' = W prod (I - 2 u_i u_i^T / |u_i|^2)", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(perturb=perturb, fresh=fresh),
    laws=Laws(draw={"r": [2, 4], "target_modules": [["up", "mid"]]}, mixed_batch=True,
              stacks=False, fresh_identity=True),
)
