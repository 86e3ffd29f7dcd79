"""VB-LoRA: Li et al., 2024, https://arxiv.org/abs/2405.15179, eq. 3.3."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

BANK = "base_model.vblora_vector_bank"


def shapes(site, c):
    r, b, h = c["r"], c["vector_length"], c["num_vectors"]
    return {"vblora_logits_A": (r, site.inp // b, h), "vblora_logits_B": (site.out // b, r, h)}


def shared(c, sites):
    """One trained bank for all layers."""
    return {BANK: (c["num_vectors"], c["vector_length"])}


def mixture(logits, k, soft=True, among=None):
    """Weights (h,): a softmax over the k largest logits, 0 elsewhere."""
    top = np.argsort(-logits)[:k]
    over = top if among is None else np.argsort(-logits)[:among]
    weights = np.zeros(len(logits))
    weights[top] = np.exp(logits[top]) / np.exp(logits[over]).sum() if soft else 1 / k
    return weights


def factor(logits, bank, k, **faulty):
    """The chosen vectors, one after the other: (rows, pieces * b) from logits (rows, pieces, h)."""
    return np.stack([np.concatenate([mixture(p, k, **faulty) @ bank for p in row]) for row in logits])


def delta(site, t, c, along_rank=False, **faulty):
    bank, k = t[BANK], c.get("topk", 2)
    A = factor(t["vblora_logits_A"], bank, k, **faulty)  # (r, in)
    columns = t["vblora_logits_B"].transpose(1, 0, 2)  # (r, out / b, h)
    B = factor(columns, bank, k, **faulty).T  # (out, r)
    if along_rank:
        B = B.reshape(-1, c["vector_length"], c["r"]).transpose(0, 2, 1).reshape(B.shape)
    return B @ A


def formula(site, t, c):
    return site.W + delta(site, t, c), site.b


def vblora(**more):
    return {"r": 3, "num_vectors": 8, "vector_length": 4, "target_modules": ["up", "mid"], **more}


def spread(key, fresh, rng):
    """Logits far enough apart that no rounding changes which are the largest; a bank that is not small."""
    if "logits" not in key:
        return rng.normal(size=fresh.shape) / 2
    return np.ascontiguousarray(rng.permuted(np.broadcast_to(np.arange(fresh.shape[-1]) / 4, fresh.shape), axis=-1))


def compact(tensors, c):
    """Of each piece's logits, which are the largest, and all weights but the last."""
    if not c.get("save_only_topk_weights"):
        return tensors
    found, k = {}, c.get("topk", 2)
    for key, logits in tensors.items():
        if "logits" not in key:
            found[key] = logits
            continue
        top = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
        weights = np.exp(np.take_along_axis(np.asarray(logits, np.float64), top, -1))
        found[f"{key}_topk_indices"] = top
        found[f"{key}_topk_weights"] = (weights / weights.sum(-1, keepdims=True))[..., :-1]
    return found


def expanded(tensors, c):
    found = dict(tensors)
    for key in [k for k in tensors if k.endswith("_topk_indices")]:
        weights = np.asarray(found.pop(key.replace("indices", "weights")), np.float64)
        weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1)
        logits = np.full((*weights.shape[:-1], c["num_vectors"]), -1e3)
        np.put_along_axis(logits, found.pop(key).astype(int), np.log(weights), -1)
        found[key.removesuffix("_topk_indices")] = logits
    return found


ROWS = [
    Row("linear/plain", "mlp-even", vblora(), "core", second={}),
    Row("linear/tokens", "mlp-even-tokens", vblora(r=2, num_vectors=5), "core"),
    Row("linear/short-vectors", "mlp-even", vblora(vector_length=2)),
    Row("linear/one-vector", "mlp-even", vblora(topk=1)),
    Row("linear/three-vectors", "mlp-even", vblora(topk=3)),
    Row("linear/modules-to-save", "mlp-even", vblora(modules_to_save=["head"])),
    Row("conv1d-hf/plain", "gpt-even", vblora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
]


def wrong(**faulty):
    return {"formula": lambda s, t, c: (s.W + delta(s, t, c, **faulty), s.b)}


FAULTS = (
    Fault("softmax-over-all", "the weights are a softmax over all logits, of which the k largest are kept",
          wrong(among=10**6)),
    Fault("mean-of-the-chosen", "the chosen vectors are averaged", wrong(soft=False), spares=("linear/one-vector",)),
    Fault("one-vector-too-many", "k + 1 vectors are mixed",
          {"formula": lambda s, t, c: (s.W + delta(s, t, {**c, "topk": c.get("topk", 2) + 1}), s.b)}),
    Fault("pieces-of-b-along-the-rank", "the pieces of B are laid out with the rank inside", wrong(along_rank=True)),
)

METHOD = Method(
    name="vblora", peft_type="VBLORA", title="VB-LoRA", paper="https://arxiv.org/abs/2405.15179",
    equation="W' = W + B A, each piece of B and A = sum over the top k of softmax(logits) * bank", rows=ROWS,
    shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(shared=shared, perturb=spread, compact=compact, expanded=expanded),
    laws=Laws(draw={"r": [1, 3], "num_vectors": [6, 9], "vector_length": [2, 4], "topk": [2, 3],
                    "target_modules": [["up", "mid"]]}, bases=("mlp-even-tokens",)),
)
