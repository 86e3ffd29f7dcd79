"""RandLoRA: Albert et al., 2025, https://arxiv.org/abs/2502.00987, eq. 4, with the reference's pairing of the bases."""

from math import ceil

import numpy as np

from ..method import KEY, Fault, Laws, Method, Row, Tensors

A, B = "base_model.randlora_A", "base_model.randlora_B"


def sizes(site):
    return min(site.inp, site.out), max(site.inp, site.out)


def count(site, c):
    """How many bases of rank r fill the smaller dimension."""
    return ceil(sizes(site)[0] / c["r"])


def shapes(site, c):
    return {"randlora_lambda": (c["r"], count(site, c)), "randlora_gamma": (count(site, c), sizes(site)[0])}


def shared(c, sites):
    """One frozen pair for all layers; the reference saves it again under the name of each layer."""
    small, large = sorted((max(s.inp for s in sites), max(s.out for s in sites)))
    pair = {"randlora_A": (c["r"], 1, small), "randlora_B": (large, ceil(small / c["r"]), c["r"])}
    places = ("base_model", *(KEY + s.path for s in sites))
    return {f"{place}.{slot}": shape for place in places for slot, shape in pair.items()}


def delta(site, t, c, pairing="reference", scale=None):
    """Sum over k of a column of B and a scaled row of A. In the paper both belong to base j and rank i; the reference
    counts the columns as (j, i) and the rows as (i, j), and pairs them by their place."""
    small, large = sizes(site)
    r, n = c["r"], count(site, c)
    l, g = t["randlora_lambda"], t["randlora_gamma"]
    columns = [t[B][:large, j, i] for j in range(n) for i in range(r)]
    order = [(i, j) for i in range(r) for j in range(n)] if pairing == "reference" else \
        [(i, j) for j in range(n) for i in range(r)]
    rows = [l[i, j] * t[A][i, 0, :small] * g[j] for i, j in order]
    D = np.sum([np.outer(b, a) for b, a in zip(columns, rows)], 0)
    D = D if site.inp == small else D.T
    return D * (c["randlora_alpha"] / r if scale is None else scale(c))


def formula(site, t, c):
    return site.W + delta(site, t, c), site.b


def randlora(**more):
    return {"r": 3, "randlora_alpha": 5, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", randlora(), "core", second={}),
    Row("linear/no-base-bias", "mlp-nobias", randlora(r=4)),
    Row("linear/tokens", "mlp-tokens", randlora(r=2, projection_prng_key=5), "core"),
    Row("linear/one-base", "mlp", randlora(r=12)),
    Row("linear/three-sizes", "mlp", randlora(target_modules=["up", "mid", "head"]),
        note="the last layer has more inputs than outputs, so its sum is transposed"),
    Row("linear/sparse", "mlp", randlora(sparse=True)),
    Row("linear/very-sparse", "mlp", randlora(very_sparse=True)),
    Row("conv1d-hf/plain", "gpt", randlora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
]

FAULTS = (
    Fault("pairs-of-the-paper", "column (j, i) of B meets row (i, j) of A, as in the paper and not as in the reference",
          {"formula": lambda s, t, c: (s.W + delta(s, t, c, "paper"), s.b)}, spares=("linear/one-base",)),
    Fault("unscaled-by-rank", "the sum is multiplied by alpha instead of alpha / r",
          {"formula": lambda s, t, c: (s.W + delta(s, t, c, scale=lambda c: c["randlora_alpha"]), s.b)}),
    Fault("gamma-ignored", "gamma is not multiplied in",
          {"formula": lambda s, t, c: (s.W + delta(s, {**t, "randlora_gamma": t["randlora_gamma"] * 0 + 1}, c), s.b)}),
)

METHOD = Method(
    name="randlora", peft_type="RANDLORA", title="RandLoRA", paper="https://arxiv.org/abs/2502.00987",
    equation="W' = W + alpha / r * sum_j B_j diag(lambda_j) A diag(gamma_j)", rows=ROWS, shapes=shapes,
    formula=formula, faults=FAULTS,
    tensors=Tensors(shared=shared, frozen=(A, B, "randlora_A", "randlora_B"),
                    unsaved=("save_projection", (A, B, "randlora_A", "randlora_B")),
                    neutral={"randlora_lambda": 0.0}),
    laws=Laws(draw={"r": [2, 3, 6], "randlora_alpha": [2, 5], "target_modules": [["up", "mid"]]}),
)
