"""LoHa: FedPara, Hyeon-Woo et al., 2021, https://arxiv.org/abs/2108.06098, propositions 1 and 3."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from .lora import of_pattern


def rank(site, c):
    return of_pattern(c.get("rank_pattern"), site.path, c.get("r", 8))


def scaling(site, c):
    return of_pattern(c.get("alpha_pattern"), site.path, c.get("alpha", 8)) / rank(site, c)


def with_core(site, c):
    return bool(c.get("use_effective_conv2d")) and np.prod(site.kernel) > 1


def core(r, kernel):
    """A one-dimensional kernel counts as (k, 1)."""
    return (r, r, *kernel, 1) if len(kernel) == 1 else (r, r, *kernel)


def shapes(site, c):
    r, (out, inp) = rank(site, c), site.W.shape[:2]
    if with_core(site, c):
        return {f"hada_{n}": s for i in "12" for n, s in {f"w{i}_a": (r, out), f"w{i}_b": (r, inp),
                                                          f"t{i}": core(r, site.kernel)}.items()}
    width = int(np.prod(site.W.shape[1:]))
    return {f"hada_{n}": s for i in "12" for n, s in {f"w{i}_a": (out, r), f"w{i}_b": (r, width)}.items()}


def factor(site, t, i):
    a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
    D = np.einsum("ij...,ip,jq->pq...", t[f"hada_t{i}"], a, b) if f"hada_t{i}" in t else a @ b
    return D.reshape(site.W.shape)


def formula(site, t, c):
    return site.W + scaling(site, c) * factor(site, t, 1) * factor(site, t, 2), site.b


def loha(**more):
    return {"r": 4, "alpha": 6, "target_modules": ["up", "mid"], **more}


C, P = ["c1", "c2"], ["q_proj", "v_proj"]
WRONG = ("with a core, the reference's hand-written backward pass gives a factor the gradient that belongs to the core "
         "of the other pair; outputs and merged weights agree")
ROWS = [
    Row("linear/plain", "mlp", loha(), "core", second=loha(r=2, alpha=3)),
    Row("linear/tokens", "mlp-tokens", loha(r=2, alpha=7), "core"),
    Row("linear/no-base-bias", "mlp-nobias", loha(r=1, alpha=2)),
    Row("linear/rank-is-width", "mlp", loha(r=10, alpha=15)),
    Row("linear/patterns", "blocks", loha(target_modules=P, rank_pattern={"model.layers.1.q_proj": 2, "v_proj": 1},
                                          alpha_pattern={"q_proj": 3})),
    Row("linear/modules-to-save", "mlp", loha(modules_to_save=["head"])),
    Row("conv1d/plain", "conv1d", loha(target_modules=C)),
    Row("conv1d/effective", "conv1d", loha(target_modules=C, use_effective_conv2d=True), disputed=WRONG),
    Row("conv2d/plain", "conv2d", loha(target_modules=C), "core"),
    Row("conv2d/effective", "conv2d", loha(target_modules=C, use_effective_conv2d=True), "core", disputed=WRONG),
    Row("conv2d/strided", "conv2d-strided", loha(target_modules=C, use_effective_conv2d=True, r=2), disputed=WRONG),
    Row("conv2d/one-by-one", "conv2d-1x1", loha(target_modules=C, use_effective_conv2d=True)),
    Row("conv2d/groups", "conv2d-groups", loha(target_modules=C)),
]

EFFECTIVE = ("conv1d/effective", "conv2d/effective", "conv2d/strided")
FAULTS = (
    Fault("sum-for-product", "the two factors are added",
          {"formula": lambda s, t, c: (s.W + scaling(s, c) * (factor(s, t, 1) + factor(s, t, 2)), s.b)}),
    Fault("alpha-not-over-r", "the scale is alpha, not alpha / r",
          {"formula": lambda s, t, c: (s.W + rank(s, c) * (formula(s, t, c)[0] - s.W), s.b)},
          spares=("linear/no-base-bias",)),
    Fault("core-transposed", "the core's two rank axes are exchanged",
          {"formula": lambda s, t, c: formula(s, {k: v.swapaxes(0, 1) if "_t" in k else v for k, v in t.items()}, c)},
          cases=EFFECTIVE),
)

METHOD = Method(
    name="loha", peft_type="LOHA", title="LoHa", paper="https://arxiv.org/abs/2108.06098",
    equation="W' = W + (alpha / r) (A1 B1) * (A2 B2)", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"hada_w2_b": 0.0}),
    laws=Laws(draw={"r": [1, 2, 5], "alpha": [1, 3, 8], "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
