"""GLoRA: Chavan et al., 2023, https://arxiv.org/abs/2306.07967."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def kinds(site, c):
    """Of the five parts: how each is parametrised, and its whole shape."""
    ab, o, i = c.get("config_A_B", "lora"), site.out, site.inp
    cc, de = (c.get("config_C", "lora"), c.get("config_D_E", "constant")) if site.b is not None else ("none", "none")
    return {"A": (ab, (o, i)), "B": (ab, (o, i)), "C": (cc, (i, 1)), "D": (de, (o,)), "E": (de, (o,))}


def shapes(site, c):
    r = c.get("r", 8)
    found: dict = {}
    for name, (kind, shape) in kinds(site, c).items():
        if kind == "lora":
            found |= {f"glora_{name}.Xd": (shape[0], r), f"glora_{name}.Xu": (r, shape[1])}
        elif kind == "vector":
            found |= {f"glora_{name}.X": (shape[0],) if len(shape) == 1 else (shape[0], 1)}
        elif kind == "constant":
            found |= {f"glora_{name}.X": (1,)}
    return found


def part(site, t, c, name):
    kind, shape = kinds(site, c)[name]
    if kind == "none":
        return np.zeros(shape)
    if kind == "lora":
        return t[f"glora_{name}.Xd"] @ t[f"glora_{name}.Xu"]
    return np.broadcast_to(t[f"glora_{name}.X"], shape)


def parts(site, t, c):
    return [part(site, t, c, name) for name in "ABCDE"]


def formula(site, t, c):
    A, B, C, D, E = parts(site, t, c)
    return site.W * (1 + A) + B, None if site.b is None else site.b * (1 + D) + E + (site.W @ C)[:, 0]


def glora(**more):
    return {"r": 3, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", glora(), "core"),
    Row("linear/vectors", "mlp-tokens", glora(config_A_B="vector", config_C="vector", config_D_E="vector"), "core"),
    Row("linear/constants", "mlp", glora(config_A_B="constant", config_C="none"), dtypes=("float64", "float32"),
        note="B's gradient is one sum whose terms cancel: too rough in bfloat16"),
    Row("linear/bias-alone", "mlp", glora(config_A_B="none", config_C="lora", config_D_E="none")),
    Row("linear/weight-alone", "mlp-tokens", glora(config_C="none", config_D_E="none", r=1)),
    Row("linear/no-base-bias", "mlp-nobias", glora(), "core"),
    Row("linear/modules-to-save", "mlp", glora(modules_to_save=["head"])),
]


def bias_of_new_weight(site, t, c):
    W, b = formula(site, t, c)
    C = part(site, t, c, "C")
    return W, None if b is None else b + ((W - site.W) @ C)[:, 0]


def without_w(site, t, c):
    A, B, *_ = parts(site, t, c)
    return site.W + A + B, formula(site, t, c)[1]


FAULTS = (
    Fault("scale-added", "A is added, not multiplied by W", {"formula": without_w}, spares=("linear/bias-alone",)),
    Fault("bias-from-the-new-weight", "C is multiplied by W' instead of W", {"formula": bias_of_new_weight},
          cases=("linear/plain", "linear/vectors", "linear/modules-to-save")),
    Fault("bias-left-alone", "the bias does not change", {"formula": lambda s, t, c: (formula(s, t, c)[0], s.b)},
          spares=("linear/weight-alone", "linear/no-base-bias")),
)

METHOD = Method(
    name="glora", peft_type="GLORA", title="GLoRA", paper="https://arxiv.org/abs/2306.07967",
    equation="W' = W + W * A + B, b' = b + b * D + E + W C", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(frozen=("zeros",), neutral={"Xd": 0.0, "X": 0.0}),
    laws=Laws(draw={"r": [1, 3], "config_A_B": ["lora", "vector", "constant"], "config_C": ["lora", "vector"],
                    "config_D_E": ["vector", "constant"], "target_modules": [["up", "mid"]]}, mixed_batch=True,
              stacks=False),
)
