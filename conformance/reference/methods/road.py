"""RoAd: Liao and Monz, 2024, https://arxiv.org/abs/2409.00119, eq. 3 and 4, as a dense matrix R."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

SIZE = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def shapes(site, c):
    size = int(site.out * SIZE[c.get("variant", "road_1")])
    return {"road_theta": (size,), "road_alpha": (size,)}


def rotation(site, t, c, sign=1):
    """R (out, out): rows j and k = j + g/2 of each group of g outputs."""
    g, variant = c.get("group_size", 64), c.get("variant", "road_1")
    h = g // 2
    R = np.zeros((site.out, site.out))
    theta, alpha = t["road_theta"], t["road_alpha"]
    for group in range(site.out // g):
        for i in range(h):
            j, k = group * g + i, group * g + h + i
            if variant == "road_1":
                jj = jk = kj = kk = group * h + i
            elif variant == "road_2":
                jj = jk = j
                kj = kk = k
            else:  # a group's 2 g values: cosines of all rows, then sines of all rows
                at = group * 2 * g
                jj, kk, jk, kj = at + i, at + h + i, at + g + i, at + g + h + i
            R[j, j] = alpha[jj] * np.cos(theta[jj])
            R[j, k] = -sign * alpha[jk] * np.sin(theta[jk])
            R[k, j] = sign * alpha[kj] * np.sin(theta[kj])
            R[k, k] = alpha[kk] * np.cos(theta[kk])
    return R


def apply(site, R):
    return R @ site.W, None if site.b is None else R @ site.b


def formula(site, t, c):
    return apply(site, rotation(site, t, c))


def interleaved(site, t, c):
    """Neighbours are paired, as some write rotary embeddings, in place of halves."""
    g = c["group_size"]
    order = np.arange(site.out).reshape(-1, 2, g // 2).swapaxes(1, 2).ravel()
    R = np.empty((site.out, site.out))
    R[:] = rotation(site, t, c)[np.ix_(order, order)]
    return apply(site, R)


def road(variant="road_1", **more):
    return {"variant": variant, "group_size": 4, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/one", "mlp-even", road(), "core", second={}),
    Row("linear/two", "mlp-even-tokens", road("road_2"), "core"),
    Row("linear/four", "mlp-even", road("road_4"), "core"),
    Row("linear/group-of-six", "mlp-even", road("road_4", group_size=6)),
    Row("linear/group-of-two", "mlp-nobias", road("road_2", group_size=2)),
    Row("linear/modules-to-save", "mlp-even", road(modules_to_save=["head"])),
]

FAULTS = (
    Fault("other-way-round", "rotates by -theta", {"formula": lambda s, t, c: apply(s, rotation(s, t, c, -1))}),
    Fault("bias-not-rotated", "the base bias is left alone",
          {"formula": lambda s, t, c: (formula(s, t, c)[0], s.b)}, spares=("linear/group-of-two",)),
    Fault("neighbours-paired", "pairs are neighbours, not halves of a group apart", {"formula": interleaved},
          spares=("linear/group-of-two",)),
    Fault("alpha-ignored", "rotates without stretching",
          {"formula": lambda s, t, c: formula(s, {**t, "road_alpha": 0 * t["road_alpha"] + 1}, c)}),
    Fault("input-rotated", "W R where R W is meant (square layers)",
          {"formula": lambda s, t, c: (s.W @ rotation(s, t, c), s.b) if s.inp == s.out else formula(s, t, c)}),
)

METHOD = Method(
    name="road", peft_type="ROAD", title="RoAd", paper="https://arxiv.org/abs/2409.00119",
    equation="y = R (W x + b), R of scaled 2 x 2 rotations", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"road_theta": 0.0, "road_alpha": 1.0}),
    laws=Laws(draw={"variant": ["road_1", "road_2", "road_4"], "group_size": [2, 4],
                    "target_modules": [["up", "mid"]]}, mixed_batch=True, stacks=False, bases=("mlp-even-tokens",)),
)
