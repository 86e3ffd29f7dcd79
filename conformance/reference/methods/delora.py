"""DeLoRA: Bini et al., 2025, https://arxiv.org/abs/2503.18225."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from .lora import of_pattern


def rank(site, c):
    return of_pattern(c.get("rank_pattern"), site.path, c.get("r", 8))


def shapes(site, c):
    r = rank(site, c)
    return {"delora_A": (r, site.inp), "delora_B": (site.out, r), "delora_lambda": (1,)}


def fresh(site, t, c):
    strength = of_pattern(c.get("lambda_pattern"), site.path, c.get("delora_lambda", 15))
    return {"delora_w_norm": np.sqrt((site.W**2).sum(0)), "delora_lambda": np.full(1, strength)}


def delta(site, t, over_r=True, width=None):
    A, B, w = t["delora_A"], t["delora_B"], t["delora_w_norm"] if width is None else width
    lengths = np.sqrt((A**2).sum(1)) * np.sqrt((B**2).sum(0))
    D = sum(np.outer(B[:, i], A[i]) / (lengths[i] or 1) for i in range(len(A)))  # a pair of length 0 adds nothing
    return t["delora_lambda"] / (len(A) if over_r else 1) * D * w


def formula(site, t, c):
    return site.W + delta(site, t), site.b


def whole_norm(site, t, c):
    A, B = t["delora_A"], t["delora_B"]
    length = np.sqrt((A**2).sum()) * np.sqrt((B**2).sum())
    return site.W + t["delora_lambda"] / len(A) * (B @ A) / length * t["delora_w_norm"], site.b


def delora(**more):
    return {"r": 3, "delora_lambda": 2, "target_modules": ["up", "mid"], **more}


P = ["q_proj", "v_proj"]
ROWS = [
    Row("linear/plain", "mlp", delora(), "core", second=delora(r=2)),
    Row("linear/no-base-bias", "mlp-nobias", delora(r=2)),
    Row("linear/tokens", "mlp-tokens", delora(r=7, delora_lambda=3), "core"),
    Row("linear/rank-one", "mlp", delora(r=1), dtypes=("float64", "float32"),
        note="lambda's gradient is one sum whose terms cancel: too rough in bfloat16"),
    Row("linear/patterns", "blocks", delora(target_modules=P, rank_pattern={"model.layers.1.q_proj": 2},
                                            lambda_pattern={"v_proj": 4})),
    Row("linear/modules-to-save", "mlp", delora(modules_to_save=["head"])),
]

FAULTS = (
    Fault("width-ignored", "the columns' norms of the frozen weight are not multiplied in",
          {"formula": lambda s, t, c: (s.W + delta(s, t, width=1), s.b)}),
    Fault("normalised-as-a-whole", "A and B are divided by their own norms, not each of the r pairs by its",
          {"formula": whole_norm}, spares=("linear/rank-one",)),
    Fault("lambda-not-over-r", "the strength is lambda, not lambda / r",
          {"formula": lambda s, t, c: (s.W + delta(s, t, over_r=False), s.b)}, spares=("linear/rank-one",)),
)

METHOD = Method(
    name="delora", peft_type="DELORA", title="DeLoRA", paper="https://arxiv.org/abs/2503.18225",
    equation="W' = W + (lambda / r) B diag(1 / |a_i| |b_i|) A diag(|W_j|)", rows=ROWS, shapes=shapes, formula=formula,
    faults=FAULTS,
    tensors=Tensors(frozen=("delora_w_norm",), neutral={"delora_B": 0.0},
                    fresh=fresh),
    laws=Laws(draw={"r": [1, 2, 5], "delora_lambda": [1, 3], "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
