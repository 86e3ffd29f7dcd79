"""Super-Tuning: https://arxiv.org/abs/2607.09287."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def count(site, c):
    return int(site.W.size * (1 - c.get("sparsity", 0.99)))


def shapes(site, c):
    found: dict[str, tuple] = {"supertuning_values": (count(site, c),), "supertuning_indices": (count(site, c),)}
    if c.get("r"):
        found.update({"supertuning_lora_A.weight": (c["r"], site.inp), "supertuning_lora_B.weight": (site.out, c["r"])})
    return found


def fresh(site, t, c):
    """The places of the largest, or smallest, entries, in that order."""
    size = np.abs(site.W).ravel()
    return {"supertuning_indices": np.argsort(-size if c.get("select_top", True) else size)[: count(site, c)]}


def sparse(site, t):
    D = np.zeros(site.W.size)
    D[np.rint(t["supertuning_indices"]).astype(int)] = t["supertuning_values"]
    return D.reshape(site.W.shape)


def low_rank(site, t, c):
    if not c.get("r"):
        return 0
    scale = (c.get("lora_alpha") or 2 * c["r"]) / c["r"]
    return scale * t["supertuning_lora_B.weight"] @ t["supertuning_lora_A.weight"]


def formula(site, t, c):
    return site.W + sparse(site, t) + low_rank(site, t, c), site.b


def perturb(key, value, rng):
    return value if key.endswith("supertuning_indices") else value + 0.3 * rng.normal(size=value.shape)


def tuning(**more):
    return {"sparsity": 0.8, "target_modules": ["up", "mid"], **more}


SUPRA = ("linear/supra", "linear/supra-alpha")
ROWS = [
    Row("linear/plain", "mlp", tuning(), "core", second={}),
    Row("linear/smallest", "mlp-tokens", tuning(select_top=False), "core"),
    Row("linear/no-base-bias", "mlp-nobias", tuning(sparsity=0.5)),
    Row("linear/supra", "mlp", tuning(r=2), "core"),
    Row("linear/supra-alpha", "mlp-tokens", tuning(r=3, lora_alpha=1.5)),
    Row("linear/modules-to-save", "mlp", tuning(modules_to_save=["head"])),
]

FAULTS = (
    Fault("replaced", "the values take the place of the base weight's entries", spares=SUPRA,
          change={"formula": lambda s, t, c: (np.where(sparse(s, t) != 0, sparse(s, t), s.W), s.b)}),
    Fault("columns-first", "places count along columns",
          {"formula": lambda s, t, c: (s.W + sparse(s, t).ravel().reshape(s.W.shape, order="F")
                                       + low_rank(s, t, c), s.b)}),
    Fault("alpha-not-divided", "B A is multiplied by alpha", cases=SUPRA, change={"formula": lambda s, t, c: (
        s.W + sparse(s, t) + c["r"] * low_rank(s, t, c), s.b)}),
    Fault("alpha-defaults-to-r", "without lora_alpha B A is not doubled", cases=("linear/supra",),
          change={"formula": lambda s, t, c: formula(s, t, {**c, "lora_alpha": c["r"]})}),
)

METHOD = Method(
    name="supertuning", peft_type="SUPERTUNING", title="Super-Tuning", paper="https://arxiv.org/abs/2607.09287",
    equation="W' = W + D + (alpha / r) B A, D where |W| is largest", rows=ROWS, shapes=shapes, formula=formula,
    faults=FAULTS,
    tensors=Tensors(whole=("supertuning_indices",), perturb=perturb, fresh=fresh, frozen=("supertuning_indices",),
                    unsaved=("save_precomputed_indices", ("supertuning_indices",)),
                    neutral={"supertuning_values": 0.0, "supertuning_lora_B.weight": 0.0}),
    laws=Laws(draw={"sparsity": [0.5, 0.9], "r": [None, 2], "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
