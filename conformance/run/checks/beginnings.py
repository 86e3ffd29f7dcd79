"""What a new adapter holds: exactly where that is determined or seeded, by moments over large layers where it is drawn.

`fixtures/beginnings.json` has for each row the description of every saved tensor, and of base weights that change.
"""

from __future__ import annotations

import numpy as np

from ...reference import store
from ...reference.bases import BASES
from ...reference.beginnings import difference
from ...reference.compare import Failure
from ...reference.draw import draw_base, rng_of
from ...reference.methods import methods
from .goldens import same_set


def begun(driver, row, seed=0, **more) -> tuple[dict, dict]:
    """A new adapter's tensors, and the base weights with it."""
    base = BASES[row["base"]]
    config = store.resolved({"peft_type": methods()[row["method"]].peft_type, **row["config"], **more})
    driver.build(base, draw_base(base, rng_of(row["base"])), config, "float32",
                 case=f"{row['method']}/beginnings/{row['id']}", seed=seed)
    return driver.state_dict(), driver.weights() if row["weights"] else {}


def check(driver, row):
    torch, signs = "torch" in driver.info(), bool(row.get("signs"))
    state, weights = begun(driver, row)
    same_set("saved keys", state, row["tensors"])
    for name, want in [*row["tensors"].items(), *row["weights"].items()]:
        if wrong := difference({**state, **weights}[name], want, signs and name in state, torch):
            raise Failure(f"{name} of a new adapter: {wrong[0]}", expected=wrong[1], got=wrong[2])
    other, _ = begun(driver, row, seed=1)
    for name, want in row["tensors"].items():
        if "at" not in want and np.array_equal(other[name], state[name]):
            raise Failure(f"{name} of a new adapter does not depend on the random state")
    drawn = [name for name, want in row["tensors"].items() if "at" not in want and np.prod(want["shape"]) > 8]
    for i, name in enumerate(drawn):
        for twin in drawn[:i] if not row.get("twins") else ():
            if np.array_equal(state[name], state[twin]):
                raise Failure(f"{name} and {twin} of a new adapter hold the same numbers")
    if row.get("key"):
        changed, _ = begun(driver, row, **{row["key"]: row["config"].get(row["key"], 0) + 11})
        for name, want in row["tensors"].items():
            if "at" in want and "std" in want and np.array_equal(changed[name], state[name]):
                raise Failure(f"{name} of a new adapter does not depend on {row['key']}")
