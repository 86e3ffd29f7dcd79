"""LoKr: LyCORIS, Yeh et al., 2023, https://arxiv.org/abs/2309.14859."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from .loha import core, rank, scaling


def split(n, factor):
    """n as two factors: `factor` first if it divides, else the largest divisor up to it and to the square root."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    m = max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n and (factor == -1 or d <= factor))
    return m, n // m


def shapes(site, c):
    r, f = rank(site, c), c.get("decompose_factor", -1)
    (a, b), (m, n) = split(site.W.shape[0], f), split(site.W.shape[1], f)
    left = {"w1": (a, m)}
    if c.get("decompose_both") and 2 * r < max(a, m):
        left = {"w1_a": (a, r), "w1_b": (r, m)}
    right = {"w2_a": (b, r), "w2_b": (r, n * int(np.prod(site.kernel)))}
    if 2 * r >= max(b, n):
        right = {"w2": (b, n, *site.kernel)}
    elif c.get("use_effective_conv2d") and np.prod(site.kernel) > 1:
        right = {"w2_a": (r, b), "w2_b": (r, n), "t2": core(r, site.kernel)}
    return {f"lokr_{k}": s for k, s in (left | right).items()}


def factors(site, t):
    """W1 (a, c) and W2 (b, d * taps); a whole W2 of a Conv1d keeps its three axes: the reference's convention."""
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = np.einsum("ij...,ip,jq->pq...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    return w1, w2 if w2.ndim == 3 else w2.reshape(len(w2), -1)


def kron(site, t):
    return np.kron(*factors(site, t)).reshape(site.W.shape)


def formula(site, t, c):
    return site.W + scaling(site, c) * kron(site, t), site.b


def lokr(**more):
    return {"r": 1, "alpha": 6, "target_modules": ["up", "mid"], **more}


C, P = ["c1", "c2"], ["q_proj", "v_proj"]
ROWS = [
    Row("linear/plain", "mlp", lokr(), "core", second=lokr(r=2, alpha=3)),
    Row("linear/full", "mlp-tokens", lokr(r=3)),
    Row("linear/decompose-both", "mlp-even", lokr(decompose_both=True, decompose_factor=4), "core"),
    Row("linear/decompose-factor", "mlp", lokr(decompose_factor=5, r=2)),
    Row("linear/no-base-bias", "mlp-nobias", lokr(r=2)),
    Row("linear/patterns", "blocks", lokr(target_modules=P, rank_pattern={"model.layers.1.q_proj": 2},
                                          alpha_pattern={"q_proj": 3})),
    Row("conv1d/flat", "conv1d", lokr(target_modules=C)),
    Row("conv1d/full", "conv1d", lokr(target_modules=C, r=4)),
    Row("conv1d/effective", "conv1d", lokr(target_modules=C, r=2, decompose_factor=1, use_effective_conv2d=True),
        note="at r=1 the reference fails in torch.kron"),
    Row("conv2d/flat", "conv2d", lokr(target_modules=C), "core"),
    Row("conv2d/full", "conv2d", lokr(target_modules=C, r=4)),
    Row("conv2d/effective", "conv2d", lokr(target_modules=C, r=2, decompose_factor=1, use_effective_conv2d=True),
        "core"),
    Row("conv2d/one-by-one", "conv2d-1x1", lokr(target_modules=C, r=2, decompose_factor=1, use_effective_conv2d=True)),
    Row("conv2d/groups", "conv2d-groups", lokr(target_modules=C)),
]

FAULTS = (
    Fault("factors-exchanged", "the Kronecker product is taken the other way round",
          {"formula": lambda s, t, c: (s.W + scaling(s, c) * np.kron(*factors(s, t)[::-1]).reshape(s.W.shape), s.b)},
          spares=("conv1d/effective", "conv2d/effective", "conv2d/one-by-one")),
    Fault("alpha-not-over-r", "the scale is alpha, not alpha / r",
          {"formula": lambda s, t, c: (s.W + rank(s, c) * (formula(s, t, c)[0] - s.W), s.b)},
          cases=("linear/full", "linear/no-base-bias", "conv1d/full", "conv2d/full", "conv2d/effective")),
    Fault("core-transposed", "the core's two rank axes are exchanged",
          {"formula": lambda s, t, c: formula(s, {k: v.swapaxes(0, 1) if "_t" in k else v for k, v in t.items()}, c)},
          cases=("conv1d/effective", "conv2d/effective")),
)

METHOD = Method(
    name="lokr", peft_type="LOKR", title="LoKr", paper="https://arxiv.org/abs/2309.14859",
    equation="W' = W + (alpha / r) W1 (x) W2", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"lokr_w1": 0.0, "lokr_w1_a": 0.0}),
    laws=Laws(draw={"r": [1, 2, 4], "alpha": [1, 3, 8], "decompose_both": [False, True],
                    "decompose_factor": [-1, 1, 2], "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
