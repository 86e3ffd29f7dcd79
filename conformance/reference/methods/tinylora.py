"""TinyLoRA: Morris et al., 2026, https://arxiv.org/abs/2602.04118."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

V = "base_model.tinylora_v"
FROZEN = ("tinylora_A", "tinylora_B", "tinylora_P")
ORDER = ("up", "mid", "head")


def table(site):
    """The sizes of the matrix that is decomposed: an embedding's stands (tokens, dim)."""
    return site.W.shape if site.kind != "Embedding" else site.W.shape[::-1]


def shapes(site, c):
    rows, columns = table(site)
    r = min(c["r"], rows, columns)
    found = {"tinylora_A": (r, columns), "tinylora_B": (rows, r), "tinylora_P": (c["u"], r, r)}
    return {k: s for k, s in found.items() if k != "tinylora_P" or c.get("save_projection", True)}


def groups(c, layers):
    return max(1, round(layers * (1 - c.get("weight_tying", 0.0))))


def shared(c, sites):
    """One trained vector for each group of layers."""
    return {f"{V}.{g}": (c["u"],) for g in range(groups(c, len(sites)))}


def vector(site, t, c, group=None):
    """The layer's v; groups are runs of layers in the model's order."""
    if group is None:
        named = c["target_modules"]
        targets = [n for n in ORDER if n in named] if set(named) <= set(ORDER) else list(named)
        n = groups(c, len(targets))
        group = min(targets.index(site.path) // max(1, len(targets) // n), n - 1)
    return t[f"{V}.{group}"]


def delta(site, t, v, turned=False):
    R = np.tensordot(v, t["tinylora_P"], 1)
    D = t["tinylora_B"] @ (R.T if turned else R) @ t["tinylora_A"]
    return D if site.kind != "Embedding" else D.T


def formula(site, t, c):
    return site.W + delta(site, t, vector(site, t, c)), site.b


def tinylora(**more):
    return {"r": 2, "u": 4, "target_modules": ["up", "mid"], **more}


THREE = list(ORDER)
ROWS = [
    Row("linear/plain", "mlp", tinylora(), "core", second={}),
    Row("linear/no-base-bias", "mlp-nobias", tinylora(r=3, u=2)),
    Row("linear/tokens", "mlp-tokens", tinylora(u=6, projection_seed=5), "core"),
    Row("linear/full-rank", "mlp", tinylora(r=50, target_modules=THREE)),
    Row("linear/all-tied", "mlp", tinylora(weight_tying=1.0)),
    Row("linear/partly-tied", "mlp", tinylora(weight_tying=0.4, target_modules=THREE),
        note="two vectors for three layers: the second is shared by the last two"),
    Row("embedding/plain", "embedding", tinylora(target_modules=["emb"])),
    Row("embedding/scaled", "embedding-scaled", tinylora(target_modules=["emb"]), golden="formula",
        note="the reference's forward does not scale what it adds, unlike its merged weight; the law wins"),
    Row("conv1d-hf/plain", "gpt", tinylora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
]

FAULTS = (
    Fault("r-transposed", "R is transposed",
          {"formula": lambda s, t, c: (s.W + delta(s, t, vector(s, t, c), turned=True), s.b)}),
    Fault("all-tied", "every layer takes the first vector",
          {"formula": lambda s, t, c: (s.W + delta(s, t, vector(s, t, c, 0)), s.b)},
          spares=("linear/all-tied", "embedding/plain", "embedding/scaled")),
    Fault("v-squared", "the entries of v are squared",
          {"formula": lambda s, t, c: (s.W + delta(s, t, vector(s, t, c) ** 2), s.b)}),
)

METHOD = Method(
    name="tinylora", peft_type="TINYLORA", title="TinyLoRA", paper="https://arxiv.org/abs/2602.04118",
    equation="W' = W + B (sum_i v_i P_i) A", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(shared=shared, frozen=FROZEN, unsaved=("save_projection", ("tinylora_P",)),
                    perturb=lambda key, fresh, rng: fresh + rng.normal(size=fresh.shape),
                    neutral={f"{V}.{group}": 0.0 for group in range(3)}),
    laws=Laws(draw={"r": [1, 3], "u": [2, 5], "weight_tying": [0.0, 1.0], "target_modules": [["up", "mid"]]}),
)
