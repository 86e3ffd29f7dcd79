"""What a new adapter holds: exactly where that is determined or seeded, by moments over large layers where it is drawn.

`fixtures/beginnings.json` has for each row the description of every saved tensor, and of base weights that change.
"""

from __future__ import annotations

import numpy as np

from ...reference import store
from ...reference.bases import BASES
from ...reference.beginnings import difference
from ...reference.compare import Failure, first_difference
from ...reference.draw import draw_base, rng_of
from ...reference.methods import methods
from .goldens import same_set

SAMPLES = 192
NEAR = 1e-3  # what is taken from large numbers and added again


def data_of(base) -> dict:
    """Inputs whose directions are of different weight, and what gradients of the output are taken with."""
    rng = rng_of("data")
    width = base["input"]["shape"][-1]
    x = rng.normal(size=(SAMPLES, width)) * np.geomspace(2, 0.2, width)
    return {"x": x.astype(np.float32), "cotangent": rng.normal(size=(SAMPLES, 4)).astype(np.float32)}


def begun(driver, row, seed=0, **more) -> tuple[dict, dict]:
    """A new adapter's tensors, and the base weights with it."""
    base, case = BASES[row["base"]], f"{row['method']}/beginnings/{row['id']}"
    config = store.resolved({"peft_type": methods()[row["method"]].peft_type, **row["config"], **more})
    weights = draw_base(base, rng_of(row["base"]))
    if row.get("data"):
        driver.build_from_data(base, weights, config, "float32", data_of(base), case=case, seed=seed,
                               batches=row.get("batches", 1))
    else:
        driver.build(base, weights, config, "float32", case=case, seed=seed)
    return driver.state_dict(), driver.weights() if row["weights"] else {}


def strengths(driver) -> dict[str, float]:
    """How much an adapter whose tensors are all 1 adds to each weight: for LoRA, its rank times its scale."""
    before = driver.weights()
    driver.load({k: np.ones_like(v, np.float32) for k, v in driver.state_dict().items()})
    driver.merge()
    return {k: float((v - before[k]).mean()) for k, v in driver.weights().items() if not np.array_equal(v, before[k])}


def check(driver, row):
    torch, signs = "torch" in driver.info(), bool(row.get("signs"))
    state, weights = begun(driver, row)
    same_set("saved keys", state, row["tensors"])
    for name, want in [*row["tensors"].items(), *row["weights"].items()]:
        if wrong := difference({**state, **weights}[name], want, signs and name in state, torch):
            raise Failure(f"{name} of a new adapter: {wrong[0]}", expected=wrong[1], got=wrong[2])
    if "strengths" in row:
        driver.merge()
        merged, base = driver.weights(), BASES[row["base"]]
        for name, want in draw_base(base, rng_of(row["base"])).items():
            if np.abs(merged[name] - want).max() > NEAR * np.abs(want).max():
                raise Failure(f"{name} with a new adapter merged, which is to be what it was before: "
                              + first_difference(merged[name], want))
        driver.unmerge()
        found = strengths(driver)
        same_set("merged weights that the adapter changes", found, row["strengths"])
        for name, want in row["strengths"].items():
            if not np.isclose(found[name], want, rtol=1e-3):
                raise Failure(f"strength of the adapter on {name}", expected=f"{want:.6g}", got=f"{found[name]:.6g}")
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


def begins_beside(driver, case, method):
    """A second adapter of the same config begins as the first does, in every row in which no base weight changes."""
    torch = "torch" in driver.info()
    for row in store.rows("beginnings"):
        if row["method"] != method.name or row["weights"] or row.get("data"):
            continue
        begun(driver, row)
        driver.add("other", store.resolved({"peft_type": method.peft_type, **row["config"], **method.laws.second}))
        state = driver.state_dict("other")
        same_set("saved keys of a second adapter", state, row["tensors"])
        for name, want in row["tensors"].items():
            if wrong := difference(state[name], want, bool(row.get("signs")), torch):
                raise Failure(f"{name} of a second adapter, {row['id']}: {wrong[0]}", expected=wrong[1], got=wrong[2])
