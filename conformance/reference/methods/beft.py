"""BEFT: Huang et al., 2025, https://arxiv.org/abs/2509.15974."""

from ..method import Fault, Laws, Method, Row, Tensors


def shapes(site, c):
    return {"beft_bias": (1, site.out)}


def formula(site, t, c):
    return site.W, site.b + t["beft_bias"][0]


def beft(**more):
    return {"target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", beft(), "core", second={}),
    Row("linear/tokens", "mlp-tokens", beft(), "core"),
    Row("linear/init-false", "mlp-even", beft(init_weights=False)),
    Row("linear/modules-to-save", "mlp", beft(modules_to_save=["head"])),
]

FAULTS = (
    Fault("replaced", "the vector takes the base bias's place", {"formula": lambda s, t, c: (s.W, t["beft_bias"][0])}),
    Fault("subtracted", "the vector is subtracted", {"formula": lambda s, t, c: (s.W, s.b - t["beft_bias"][0])}),
    Fault("scales-the-weight", "the vector scales the weight's rows, too",
          {"formula": lambda s, t, c: (s.W * (1 + t["beft_bias"].T), s.b + t["beft_bias"][0])}),
)

METHOD = Method(
    name="beft", peft_type="BEFT", title="BEFT", paper="https://arxiv.org/abs/2509.15974", equation="y = W x + b + d",
    rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"beft_bias": 0.0}),
    laws=Laws(draw={"target_modules": [["up", "mid"]]}, mixed_batch=True),
)
