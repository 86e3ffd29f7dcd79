"""OFT: Qiu et al., 2023, https://arxiv.org/abs/2306.07280; Neumann series: OFTv2, https://arxiv.org/abs/2506.19847.

The reference's two parametrisations are inverse to each other: its series approximates (I + Q)(I - Q)^-1, its exact
solution is (I - Q)(I + Q)^-1. Both are covered as they are.
"""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def divisor(n, wanted):
    """The divisor of n next to `wanted`, the smaller one of two."""
    if wanted >= n:
        return n
    lower = max(d for d in range(1, wanted + 1) if n % d == 0)
    higher = min(d for d in range(wanted, n + 1) if n % d == 0)
    return lower if wanted - lower <= higher - wanted else higher


def blocks(site, c):
    """(number of blocks, block size) over the rotated dimension."""
    n = site.out if site.kind == "Embedding" else int(site.inp * np.prod(site.kernel))
    r, size = c.get("r", 0), c.get("oft_block_size", 32)
    if r == 0:
        size = divisor(n, size)
        return n // size, size
    r = divisor(n, r)
    return r, n // r


def slot(site):
    return "oft_embedding_R.weight" if site.kind == "Embedding" else "oft_R.weight"


def shapes(site, c):
    r, size = blocks(site, c)
    return {slot(site): (1 if c.get("block_share") else r, size * (size - 1) // 2)}


def skew(v, size):
    Q = np.zeros((len(v), size, size))
    rows, columns = np.triu_indices(size, 1)
    Q[:, rows, columns] = v
    return Q - Q.swapaxes(1, 2)


def rotations(site, t, c):
    """(blocks, size, size)"""
    r, size = blocks(site, c)
    Q = skew(t[slot(site)], size)
    if c.get("coft"):
        length = np.sqrt((Q**2).sum((1, 2), keepdims=True))
        Q = Q * np.minimum(1, c.get("eps", 6e-5) / np.sqrt(len(Q)) / length)
    I = np.eye(size)
    if c.get("use_cayley_neumann", True):
        n = c.get("num_cayley_neumann_terms", 5)
        powers = [np.linalg.matrix_power(Q, k) for k in range(n)]
        R = I + 2 * sum(powers[1:-1]) + powers[-1] if n > 2 else I + 2 * Q
    else:
        R = (I - Q) @ np.linalg.inv(I + Q)
    return np.repeat(R, r, 0) if c.get("block_share") else R


def fold(site, R):
    """W' = W R^T along the input, block by block (R W along the output of an embedding)."""
    n, size = R.shape[:2]
    if site.kind == "Embedding":
        W = site.W.reshape(n, size, -1)
        return np.einsum("nij,nik->njk", R, W).reshape(site.W.shape), site.b
    W = site.W.reshape(site.out, n, size)
    return np.einsum("nij,onj->oni", R, W).reshape(site.W.shape), site.b


def formula(site, t, c):
    return fold(site, rotations(site, t, c))


def perturb(key, fresh, rng):
    return fresh + 0.15 * rng.normal(size=fresh.shape)


def oft(**more):
    return {"r": 0, "oft_block_size": 4, "target_modules": ["up", "mid"], **more}


def by_r(r, **more):
    return oft(r=r, oft_block_size=0, **more)


C = ["c1", "c2"]
PROJECTED = "the reference projects the weights in place while running, so gradients belong to the projected weights"
ROWS = [
    Row("linear/neumann", "mlp-even-tokens", oft(), "core", second={}),
    Row("linear/exact", "mlp-even", oft(use_cayley_neumann=False), "core"),
    Row("linear/terms", "mlp-even", oft(num_cayley_neumann_terms=4)),
    Row("linear/three-terms", "mlp-even", oft(num_cayley_neumann_terms=3), disputed="asked for three terms, the "
        "reference's series has the four that it has for four: I + 2 Q + 2 Q^2 + Q^3"),
    Row("linear/by-r", "mlp-even-tokens", by_r(2)),
    Row("linear/adjusted-block", "mlp", oft(oft_block_size=4)),
    Row("linear/block-between-two", "tokens-mlp", oft(oft_block_size=6)),
    Row("linear/block-share", "mlp-even", oft(block_share=True, use_cayley_neumann=False), "core"),
    Row("linear/coft", "mlp-even", oft(coft=True, eps=0.5), disputed=PROJECTED,
        dtypes=("float32", "bfloat16"), note="the reference takes the bound's square root in float32"),
    Row("linear/modules-to-save", "mlp-even", oft(modules_to_save=["head"])),
    Row("conv2d/one-by-one", "conv2d-1x1", oft(target_modules=C), "core"),
    Row("conv2d/three-by-three", "conv2d", oft(oft_block_size=6, target_modules=C), golden="formula",
        note="the reference's forward folds overlapping patches and differs from its merged weight; the law wins"),
    Row("embedding/plain", "embedding-padded", oft(target_modules=["emb"])),
    Row("embedding/scaled", "embedding-scaled", oft(target_modules=["emb"])),
]


def wrong(**config):
    return {"formula": lambda s, t, c: formula(s, t, {**c, **config})}


FAULTS = (
    Fault("transposed", "rotates by R where R^T is meant",
          {"formula": lambda s, t, c: fold(s, rotations(s, t, c).swapaxes(1, 2))}),
    Fault("exact-for-series", "solves exactly where the Neumann series is asked for",
          {"formula": lambda s, t, c: fold(s, rotations(s, {slot(s): -t[slot(s)]},
                                                        {**c, "use_cayley_neumann": False}))},
          cases=("linear/neumann", "linear/terms", "linear/by-r")),
    Fault("last-term-twice", "the series' last term counts twice",
          {"formula": lambda s, t, c: fold(s, rotations(s, t, c) + np.linalg.matrix_power(
              skew(t[slot(s)], blocks(s, c)[1]), c.get("num_cayley_neumann_terms", 5) - 1))},
          cases=("linear/neumann", "linear/terms", "linear/by-r")),
    Fault("blocks-reversed", "blocks are applied in reverse order",
          {"formula": lambda s, t, c: fold(s, rotations(s, t, c)[::-1])},
          spares=("linear/block-share",)),
    Fault("constraint-ignored", "coft does not bound the rotation", wrong(coft=False), cases=("linear/coft",)),
)

METHOD = Method(
    name="oft", peft_type="OFT", title="OFT", paper="https://arxiv.org/abs/2306.07280",
    equation="W' = W R^T, R = diag(R_1 .. R_n) from skew-symmetric Q_i", rows=ROWS, shapes=shapes, formula=formula,
    faults=FAULTS,
    tensors=Tensors(perturb=perturb, neutral={"oft_R.weight": 0.0, "oft_embedding_R.weight": 0.0}),
    laws=Laws(draw={"r": [0], "oft_block_size": [2, 4], "use_cayley_neumann": [False, True],
                    "block_share": [False, True], "target_modules": [["up", "mid"]]}, mixed_batch=True, stacks=False,
              bases=("mlp-even-tokens",)),
)
