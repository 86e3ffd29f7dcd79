"""HiRA: Huang et al., 2025, https://openreview.net/forum?id=TwJrTz9cRS."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from ..rules import of_pattern


def names(site):
    return ("hira_embedding_A", "hira_embedding_B") if site.kind == "Embedding" else ("hira_A", "hira_B")


def shapes(site, c):
    (a, b), r, ones = names(site), of_pattern(c.get("rank_pattern"), site.path, c.get("r", 32)), [1] * len(site.kernel)
    return {a: (r, *site.W.shape[1:]), b: (site.out, r, *ones)}


def product(site, t):
    """B A, in the shape of W."""
    A, B = (t[name] for name in names(site))
    return np.einsum("or,r...->o...", B.reshape(B.shape[:2]), A)


def formula(site, t, c):
    return site.W * (1 + product(site, t)), site.b


def hira(**more):
    return {"r": 3, "target_modules": ["up", "mid"], **more}


C = ["c1", "c2"]
ROWS = [
    Row("linear/plain", "mlp", hira(), "core"),
    Row("linear/no-base-bias", "mlp-nobias", hira(r=1)),
    Row("linear/tokens", "mlp-tokens", hira(r=7), "core"),
    Row("linear/rank-is-width", "mlp", hira(r=10)),
    Row("linear/gaussian", "mlp", hira(init_weights="gaussian")),
    Row("linear/modules-to-save", "mlp", hira(modules_to_save=["head"])),
    Row("conv1d/plain", "conv1d", hira(target_modules=C)),
    Row("conv2d/plain", "conv2d", hira(target_modules=C), "core"),
    Row("conv2d/one-by-one", "conv2d-1x1", hira(target_modules=C)),
    Row("conv2d/dilated", "conv2d-dilated", hira(target_modules=C)),
    Row("conv3d/plain", "conv3d", hira(target_modules=C)),
    Row("embedding/plain", "embedding", hira(target_modules=["emb"]), "core"),
    Row("embedding/scaled", "embedding-scaled", hira(target_modules=["emb"]), golden="formula",
        note="the reference's forward does not scale what it adds, unlike its merged weight; the law wins"),
    Row("conv1d-hf/plain", "gpt", hira(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core"),
]


def swapped(site, t, c):
    D = product(site, t)
    return site.W * (1 + (D.swapaxes(0, 1) if D.shape[0] == D.shape[1] else D)), site.b


FAULTS = (
    Fault("added", "the product is added to W as if it were LoRA's",
          {"formula": lambda s, t, c: (s.W + product(s, t), s.b)}),
    Fault("without-the-one", "W is replaced by its product with B A",
          {"formula": lambda s, t, c: (s.W * product(s, t), s.b)}),
    Fault("scaled", "the product is divided by r",
          {"formula": lambda s, t, c: (s.W * (1 + product(s, t) / c["r"]), s.b)},
          spares=("linear/no-base-bias",)),
    Fault("transposed", "the product of a square layer is transposed", {"formula": swapped},
          cases=("linear/plain", "conv1d/plain", "conv2d/plain", "conv1d-hf/plain")),
)

METHOD = Method(
    name="hira", peft_type="HIRA", title="HiRA", paper="https://openreview.net/forum?id=TwJrTz9cRS",
    equation="W' = W * (1 + B A), elementwise", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"hira_B": 0.0, "hira_embedding_A": 0.0}),
    laws=Laws(draw={"r": [1, 2, 5], "target_modules": [["up", "mid"]]}, mixed_batch=True, stacks=False),
)
