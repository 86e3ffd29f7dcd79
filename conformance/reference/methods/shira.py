"""SHiRA: Bhardwaj et al., 2024, https://arxiv.org/abs/2406.13175, section 3."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from ..permutation import UNSEEDED, permutation


def count(site, c):
    return c["r"] * (site.inp + site.out)


def shapes(site, c):
    return {"shira_weight": (count(site, c),), "shira_indices": (2, count(site, c))}


def fresh(site, t, c):
    """The random mask's places, row by row."""
    seed = c.get("random_seed")
    order = permutation(site.W.size, UNSEEDED if seed is None else seed)
    return {"shira_indices": np.array(np.divmod(np.sort(order[: count(site, c)]), site.inp))}


def delta(site, t, order=1):
    D = np.zeros(site.W.shape)
    rows, columns = np.rint(t["shira_indices"]).astype(int)
    D[rows, columns] = t["shira_weight"][::order]
    return D


def formula(site, t, c):
    return site.W + delta(site, t), site.b


def transposed(site, t, c):
    D = delta(site, t)
    return site.W + (D.T if site.inp == site.out else D[::-1, ::-1]), site.b


def perturb(key, value, rng):
    return value if key.endswith("shira_indices") else value + 0.3 * rng.normal(size=value.shape)


def shira(r=2, **more):
    return {"r": r, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", shira(), "core", second={}),
    Row("linear/seed", "mlp-tokens", shira(3, random_seed=5), "core"),
    Row("linear/no-base-bias", "mlp-nobias", shira(1)),
    Row("linear/init-false", "mlp", shira(init_weights=False)),
    Row("linear/modules-to-save", "mlp", shira(modules_to_save=["head"])),
]

FAULTS = (
    Fault("replaced", "the values take the place of the base weight's entries",
          {"formula": lambda s, t, c: (np.where(delta(s, t) != 0, delta(s, t), s.W), s.b)}),
    Fault("order-reversed", "the values are written in reverse order",
          {"formula": lambda s, t, c: (s.W + delta(s, t, -1), s.b)}),
    Fault("wrong-places", "rows are taken for columns", {"formula": transposed}),
)

METHOD = Method(
    name="shira", peft_type="SHIRA", title="SHiRA", paper="https://arxiv.org/abs/2406.13175",
    equation="W' = W + D, D of r (in + out) entries", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(whole=("shira_indices",), perturb=perturb, fresh=fresh, frozen=("shira_indices",),
                    neutral={"shira_weight": 0.0}),
    laws=Laws(draw={"r": [1, 3], "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
