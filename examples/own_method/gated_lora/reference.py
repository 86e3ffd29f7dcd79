"""What the conformance suite has to know of gated LoRA: its formula in NumPy, its shapes, and a few cases."""

from conformance.reference.method import Fault, Laws, Method, Row, Tensors


def shapes(site, c):
    return {"gated_A.weight": (c["r"], site.inp), "gated_B.weight": (site.out, c["r"]), "gated_gate": (site.out,)}


def delta(site, t, c):
    return c.get("alpha", 16.0) / c["r"] * t["gated_gate"][:, None] * (t["gated_B.weight"] @ t["gated_A.weight"])


def formula(site, t, c):
    return site.W + delta(site, t, c), site.b


ROWS = [
    Row("linear/plain", "mlp", {"r": 3, "alpha": 6.0, "target_modules": ["up", "mid"]}, "core", second={}),
    Row("linear/no-base-bias", "mlp-nobias", {"r": 2, "alpha": 5.0, "target_modules": ["up", "mid"]}),
]
FAULTS = (
    Fault("gate-on-the-input", "the gate scales the inputs of square layers",
          {"formula": lambda s, t, c: (s.W + (delta(s, {**t, "gated_gate": t["gated_gate"] * 0 + 1}, c)
                                              * t["gated_gate"][None] if s.inp == s.out else delta(s, t, c)), s.b)}),
    Fault("no-scale", "s is left out", {"formula": lambda s, t, c: (s.W + delta(s, t, {**c, "alpha": c["r"]}), s.b)}),
)
METHOD = Method(
    name="gated_lora", peft_type="GATED_LORA", title="Gated LoRA", paper="examples/own_method",
    equation="W' = W + diag(g) s B A", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"gated_B.weight": 0.0}),
    laws=Laws(draw={"r": [1, 3, 6], "alpha": [4.0, 9.0], "target_modules": [["up", "mid"]]}, mixed_batch=True,
              scales=True),
)
