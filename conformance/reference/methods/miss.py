"""MiSS: Kang and Yin, 2024, https://arxiv.org/abs/2409.15371."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def shapes(site, c):
    r, variant = c.get("r", 64), c.get("init_weights", True)
    if variant == "bat":
        return {"miss_block": (site.out // r, r, r)}
    return {"miss_block": (r, c.get("mini_r", 1) if variant == "mini" else site.out)}


def blockwise(site, D, change):
    """`change(W_ij, D_i)` added to every (r, r) block of W."""
    r, W = D.shape[-1], site.W.copy()
    for i in range(0, site.out, r):
        for j in range(0, site.inp, r):
            W[i:i + r, j:j + r] += change(site.W[i:i + r, j:j + r], D[i // r])
    return W, site.b


def formula(site, t, c):
    D = t["miss_block"]
    if c.get("init_weights") == "bat":
        return blockwise(site, D, lambda W, d: W @ d + d)
    return site.W + D[np.arange(site.inp) % D.shape[0]][:, np.arange(site.out) % D.shape[1]].T, site.b


def miss(**more):
    return {"r": 3, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", miss(), "core", second=miss(r=2)),
    Row("linear/cut", "mlp-tokens", miss(r=4), "core"),
    Row("linear/no-base-bias", "mlp-nobias", miss(r=5)),
    Row("linear/mini", "mlp", miss(init_weights="mini", mini_r=2), "core"),
    Row("linear/mini-one", "mlp-tokens", miss(init_weights="mini", r=4)),
    Row("linear/bat", "mlp-even", miss(init_weights="bat", r=4), "core"),
    Row("linear/bat-tokens", "mlp-even-tokens", miss(init_weights="bat", r=2)),
    Row("linear/modules-to-save", "mlp", miss(modules_to_save=["head"])),
]


def spread(site, t, c):
    """Neighbouring inputs share a row of D, instead of every r-th one."""
    D = t["miss_block"]
    return site.W + D[np.arange(site.inp) * D.shape[0] // site.inp][:, np.arange(site.out) % D.shape[1]].T, site.b


def spread_outputs(site, t, c):
    D = t["miss_block"]
    return site.W + D[np.arange(site.inp) % D.shape[0]][:, np.arange(site.out) * D.shape[1] // site.out].T, site.b


def uncut(site, t, c):
    """The inputs that are left over get nothing."""
    W, D = formula(site, t, c)[0], t["miss_block"]
    rest = site.inp - site.inp % D.shape[0]
    return np.concatenate([W[:, :rest], site.W[:, rest:]], 1), site.b


BAT = ("linear/bat", "linear/bat-tokens")
FAULTS = (
    Fault("spread-for-tiled", "neighbouring inputs share a row of the shard", {"formula": spread}, spares=BAT),
    Fault("rest-ignored", "inputs beyond the last whole shard are left alone", {"formula": uncut},
          cases=("linear/cut", "linear/mini-one", "linear/no-base-bias")),
    Fault("outputs-spread", "neighbouring outputs share a column of the small shard", {"formula": spread_outputs},
          cases=("linear/mini",)),
    Fault("bat-without-shift", "the block is multiplied, but nothing is added",
          {"formula": lambda s, t, c: blockwise(s, t["miss_block"], lambda W, d: W @ d)}, cases=BAT),
    Fault("bat-from-the-left", "D W where W D is meant",
          {"formula": lambda s, t, c: blockwise(s, t["miss_block"], lambda W, d: d @ W + d)}, cases=BAT),
)

METHOD = Method(
    name="miss", peft_type="MISS", title="MiSS", paper="https://arxiv.org/abs/2409.15371",
    equation="W' = W + [D D ... D]; bat: W'_ij = W_ij + W_ij D_i + D_i", rows=ROWS, shapes=shapes, formula=formula,
    faults=FAULTS,
    tensors=Tensors(neutral={"miss_block": 0.0}),
    laws=Laws(draw={"r": [1, 2, 4, 6], "init_weights": [True, "mini"], "mini_r": [1, 2],
                    "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
