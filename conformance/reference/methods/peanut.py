"""PEANuT: Zhong et al., 2024, https://arxiv.org/abs/2410.01870: a network whose input is the frozen weight."""

from collections.abc import Callable

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

ACTIVATIONS: dict[str, Callable] = {
    "relu": lambda a: np.maximum(a, 0),
    "tanh": np.tanh,
    "linear": lambda a: a,
    "silu": lambda a: a / (1 + np.exp(-a)),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
}


def shapes(site, c):
    r, depth = c["r"], c.get("depth", 0)
    found = {"peanut_A.weight": (r, site.out), "peanut_B.weight": (site.out, r)}
    for i in range(depth):
        found |= {f"peanut_encoders.{i}.weight": (r, r), f"peanut_decoders.{i}.weight": (r, r)}
    return found


def delta(site, t, c, skips=True, reverse=True, activate=True):
    f = ACTIVATIONS[c.get("act_fn", "relu")] if activate else ACTIVATIONS["linear"]
    depth = c.get("depth", 0)
    h = [f(t["peanut_A.weight"] @ site.W)]  # (r, in): one column for each input feature
    for i in range(depth):
        h.append(f(t[f"peanut_encoders.{i}.weight"] @ h[-1]))
    out = h[depth]
    for i in range(depth):
        out = f(t[f"peanut_decoders.{i}.weight"] @ out)
        if skips:
            out = out + h[depth - 1 - i if reverse else i]
    return c.get("scaling", 1.0) * t["peanut_B.weight"] @ out


def formula(site, t, c, **wrong):
    return site.W + delta(site, t, c, **wrong), site.b


def peanut(**more):
    return {"r": 4, "target_modules": ["up", "mid"], **more}


DEEP = ("linear/two-layers", "linear/four-layers", "linear/no-base-bias")
ROWS = [
    Row("linear/plain", "mlp", peanut(), "core"),
    Row("linear/two-layers", "mlp-tokens", peanut(depth=1, act_fn="tanh", scaling=0.5), "core"),
    Row("linear/four-layers", "mlp", peanut(depth=2, act_fn="silu", scaling=2.0), "core"),
    Row("linear/no-base-bias", "mlp-nobias", peanut(depth=1, act_fn="sigmoid", r=3)),
    Row("linear/no-activation", "mlp", peanut(act_fn="linear")),
    Row("linear/modules-to-save", "mlp", peanut(modules_to_save=["head"])),
]

FAULTS = (
    Fault("no-activation", "the network is linear", {"formula": lambda s, t, c: formula(s, t, c, activate=False)},
          spares=("linear/no-activation",)),
    Fault("no-skips", "decoders are not given what the encoders saw",
          {"formula": lambda s, t, c: formula(s, t, c, skips=False)}, cases=DEEP),
    Fault("skips-in-order", "the first decoder is given the first encoder's input",
          {"formula": lambda s, t, c: formula(s, t, c, reverse=False)}, cases=("linear/four-layers",)),
    Fault("weight-ignored", "B f(A), as if W were all ones",
          {"formula": lambda s, t, c: (s.W + delta(type(s)(**{**vars(s), "W": np.ones_like(s.W)}), t, c), s.b)}),
)

METHOD = Method(
    name="peanut", peft_type="PEANUT", title="PEANuT", paper="https://arxiv.org/abs/2410.01870",
    equation="W' = W + s B f(A W)", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"peanut_B.weight": 0.0}),
    laws=Laws(draw={"r": [2, 4], "depth": [0, 1, 2], "act_fn": ["tanh", "silu"], "target_modules": [["up", "mid"]]},
              stacks=False),
)
