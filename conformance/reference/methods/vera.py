"""VeRA: Kopiczko et al., 2024, https://arxiv.org/abs/2310.11454, eq. 2."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

A, B = "base_model.vera_A", "base_model.vera_B"


def shapes(site, c):
    return {"vera_lambda_d": (c["r"],), "vera_lambda_b": (site.out,)}


def shared(c, sites):
    """One frozen pair for all layers, as large as the largest."""
    return {A: (c["r"], max(s.inp for s in sites)), B: (max(s.out for s in sites), c["r"])}


def delta(site, t, left=slice(None), top=slice(None)):
    Ai, Bo = t[A][:, left][:, : site.inp], t[B][top][: site.out]
    return (t["vera_lambda_b"][:, None] * Bo) @ (t["vera_lambda_d"][:, None] * Ai)


def formula(site, t, c):
    return site.W + delta(site, t), site.b


def vera(**more):
    return {"r": 4, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", vera(), "core", second={}),
    Row("linear/no-base-bias", "mlp-nobias", vera(r=3)),
    Row("linear/tokens", "mlp-tokens", vera(r=7, projection_prng_key=5), "core"),
    Row("linear/three-sizes", "mlp", vera(target_modules=["up", "mid", "head"])),
    Row("linear/d-initial", "mlp", vera(d_initial=1.5)),
    Row("linear/modules-to-save", "mlp", vera(modules_to_save=["head"])),
    Row("conv1d-hf/plain", "gpt", vera(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
]

LAST = {"formula": lambda s, t, c: (s.W + delta(s, t, slice(t[A].shape[1] - s.inp, None),
                                                slice(t[B].shape[0] - s.out, None)), s.b)}
FAULTS = (
    Fault("wrong-slice", "small layers use the last rows and columns of the shared pair, not the first", LAST),
    Fault("lambda-d-ignored", "lambda_d is not multiplied in",
          {"formula": lambda s, t, c: (s.W + delta(s, {**t, "vera_lambda_d": t["vera_lambda_d"] * 0 + 1}), s.b)}),
    Fault("lambda-b-on-the-input", "lambda_b scales columns where it should scale rows (square layers)",
          {"formula": lambda s, t, c: (s.W + (delta(s, {**t, "vera_lambda_b": t["vera_lambda_b"] * 0 + 1})
                                              * t["vera_lambda_b"][None] if s.inp == s.out else delta(s, t)), s.b)}),
    Fault("scaled-by-alpha", "the delta is divided by r as if it were LoRA's",
          {"formula": lambda s, t, c: (s.W + delta(s, t) / np.sqrt(c["r"]), s.b)}),
)

METHOD = Method(
    name="vera", peft_type="VERA", title="VeRA", paper="https://arxiv.org/abs/2310.11454",
    equation="W' = W + diag(lambda_b) B diag(lambda_d) A", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(shared=shared, frozen=(A, B), unsaved=("save_projection", (A, B)), neutral={"vera_lambda_b": 0.0}),
    laws=Laws(draw={"r": [1, 3, 6], "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
