"""Uni-LoRA: Li et al., 2025, https://arxiv.org/abs/2506.00799, with the indices saved beside the vector."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

THETA = "base_model.unilora_theta_d"
FIXED = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


def shapes(site, c):
    A, B = (c["r"], site.inp), (site.out, c["r"])
    return dict(zip(FIXED, (A, B, A, B)))


def shared(c, sites):
    """The one vector: all that is trained."""
    return {THETA: (c["theta_d_length"],)}


def delta(site, t, scale=lambda s: s, swap=False):
    theta = t[THETA]
    A, B = (theta[t[f"unilora_indices_{f}"].astype(int)] * scale(t[f"unilora_scales_{f}"]) for f in "AB")
    return B @ A if not swap else (B.reshape(B.shape[::-1]).T @ A)


def formula(site, t, c):
    return site.W + delta(site, t), site.b


def unilora(**more):
    return {"r": 3, "theta_d_length": 23, "save_indices": True, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", unilora(), "core", second={}),
    Row("linear/no-base-bias", "mlp-nobias", unilora(r=2)),
    Row("linear/tokens", "mlp-tokens", unilora(theta_d_length=7, proj_seed=5), "core"),
    Row("linear/unused-entries", "mlp", unilora(theta_d_length=200)),
    Row("linear/three-layers", "mlp", unilora(target_modules=["up", "mid", "head"])),
    Row("conv1d-hf/plain", "gpt", unilora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
]

FAULTS = (
    Fault("unscaled", "the entries are not divided by the root of their number",
          {"formula": lambda s, t, c: (s.W + delta(s, t, np.ones_like), s.b)}, spares=("linear/unused-entries",)),
    Fault("scaled-twice", "the entries are divided by their number, not by its root",
          {"formula": lambda s, t, c: (s.W + delta(s, t, np.square), s.b)}, spares=("linear/unused-entries",)),
    Fault("b-filled-by-columns", "B takes its indices column by column",
          {"formula": lambda s, t, c: (s.W + delta(s, t, swap=True), s.b)}),
)

METHOD = Method(
    name="unilora", peft_type="UNILORA", title="Uni-LoRA", paper="https://arxiv.org/abs/2506.00799",
    equation="W' = W + B A, A = theta[i_A] / sqrt(n[i_A]), B = theta[i_B] / sqrt(n[i_B])", rows=ROWS, shapes=shapes,
    formula=formula, faults=FAULTS,
    tensors=Tensors(shared=shared, frozen=FIXED, unsaved=("save_indices", FIXED),
                    perturb=lambda key, fresh, rng: fresh + rng.normal(size=fresh.shape)),
    laws=Laws(draw={"r": [1, 3], "theta_d_length": [5, 40], "save_indices": [True],
                    "target_modules": [["up", "mid"]]}),
)
