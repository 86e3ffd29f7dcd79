"""PVeRA: Fillioux et al., 2025, https://arxiv.org/abs/2512.07703; outside training the latent vector is its mean."""

from ..method import Fault, Laws, Method, Row, Tensors

A, B = "base_model.pvera_A", "base_model.pvera_B"


def shapes(site, c):
    return {"pvera_lambda_d": (2 * c["r"],), "pvera_lambda_b": (site.out,)}


def shared(c, sites):
    """One frozen pair for all layers, as large as the largest; A has rows for the mean and for the log-variance."""
    return {A: (2 * c["r"], max(s.inp for s in sites)), B: (max(s.out for s in sites), c["r"])}


def delta(site, t, rows, scales=None):
    D = t["pvera_lambda_d"][rows if scales is None else scales][:, None] * t[A][rows][:, : site.inp]
    return t["pvera_lambda_b"][:, None] * (t[B][: site.out] @ D)


def formula(site, t, c):
    return site.W + delta(site, t, slice(None, c["r"])), site.b


def pvera(**more):
    return {"r": 4, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", pvera(), "core", second={}),
    Row("linear/no-base-bias", "mlp-nobias", pvera(r=3)),
    Row("linear/tokens", "mlp-tokens", pvera(r=7, projection_prng_key=5), "core"),
    Row("linear/three-sizes", "mlp", pvera(target_modules=["up", "mid", "head"])),
    Row("linear/d-initial", "mlp", pvera(d_initial=1.5)),
    Row("linear/modules-to-save", "mlp", pvera(modules_to_save=["head"])),
    Row("conv1d-hf/plain", "gpt", pvera(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
]


def wrong(rows, scales=None):
    return {"formula": lambda s, t, c: (s.W + delta(s, t, *(f(c["r"]) for f in (rows, scales) if f)), s.b)}


FAULTS = (
    Fault("variance-for-mean", "the half of A and lambda_d that gives the log-variance is taken for the mean",
          wrong(lambda r: slice(r, None))),
    Fault("interleaved", "mean and log-variance are taken from alternating rows, not from two halves",
          wrong(lambda r: slice(None, None, 2)), spares=()),
    Fault("halves-of-lambda-swapped", "the mean's rows of A are scaled by the log-variance's half of lambda_d",
          wrong(lambda r: slice(None, r), lambda r: slice(r, None))),
)

METHOD = Method(
    name="pvera", peft_type="PVERA", title="PVeRA", paper="https://arxiv.org/abs/2512.07703",
    equation="W' = W + diag(lambda_b) B diag(lambda_d[:r]) A[:r]", rows=ROWS, shapes=shapes, formula=formula,
    faults=FAULTS,
    tensors=Tensors(shared=shared, frozen=(A, B), unsaved=("save_projection", (A, B)), neutral={"pvera_lambda_b": 0.0}),
    laws=Laws(draw={"r": [1, 3, 6], "target_modules": [["up", "mid"]]}),
)
