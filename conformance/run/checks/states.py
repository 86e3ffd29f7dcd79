"""What a model is after each step of an adapter's life: its output, which adapters are active, what is trained.

The outputs follow from the steps. The names are conventions, so they are recorded, in `fixtures/states.json`.
"""

from __future__ import annotations

import numpy as np

from ...reference import formulas, store
from ...reference.compare import Failure, close
from ...reference.method import turned
from ...reference.numpy_model import parameters_of
from .goldens import closest_gauge, same_set, start


def applies(case) -> bool:
    return case.id in store.states()["cases"]


def worth_recording(case, method) -> bool:
    """A case of every method, and those whose adapters hold whole modules or tokens beside what is their own."""
    return not method.laws.single and not case.data.get("live") and not case.data.get("disputed") and bool(
        case.data.get("trace") or case.config.get("modules_to_save") or case.config.get("trainable_token_indices"))


def second_adapter(case, method) -> tuple[dict, dict]:
    """(config, tensors) of the adapter "other": the lifecycle's, or the first one's, smaller."""
    if case.data.get("trace"):
        return case.second, case.tensors("second")
    tensors = {k: v if method.tensors.is_frozen(k) else 0.75 * np.asarray(v, np.float64)
               for k, v in case.tensors("adapter").items()}
    return {**case.config, **method.laws.second}, tensors


def steps(driver, case, method, tensors, second, dtype):
    """Walk through an adapter's life; yields (what was done, whose output is to be expected)."""
    (config, others), pair = second, "both active" in case.data.get("trace", ())
    driver.build(case.base, case.tensors("base"), case.config, dtype, case=case.id)
    driver.load(tensors)
    yield "load", "default"

    def add():
        driver.add("other", config)
        yield "add another", "default"
        driver.load(others, "other")
        yield "load it", "default"

    yield from add()
    driver.disable(True)
    yield "disable", "plain"
    driver.disable(True)
    yield "disable again", "plain"
    driver.disable(False)
    yield "enable once", "plain"
    driver.disable(False)
    yield "enable again", "default"
    driver.switch(["other"])
    yield "switch to the other", "other"
    driver.disable(True)
    yield "disable the other", "plain"
    driver.disable(False)
    yield "enable the other", "other"
    if pair:
        driver.switch(["default", "other"])
        yield "both active", "both"
        driver.delete("other")
        yield "delete one of two that are active", "default"
        yield from add()
        driver.switch(["other"])
        yield "switch to it again", "other"
    driver.delete("other")
    yield "delete the active one", "default"
    yield from add()
    driver.switch(["other"])
    yield "switch to the new one of that name", "other"
    driver.add("third", config)
    driver.delete("third")
    yield "add a third and delete it", "other"
    driver.delete("default")
    yield "delete the first", "other"


def outputs(case, method, others, second) -> dict:
    """Whose output -> what it is."""
    found = {"plain": case.tensors("plain")["y"], "default": case.tensors("out")["y"]}
    if names := case.data.get("trace"):
        golden = case.tensors("trace")
        found["other"] = golden[str(names.index("switch to it"))]
        if "both active" in names:
            found["both"] = golden[str(names.index("both active"))]
    else:
        found["other"] = formulas.output(method, case.base, case.tensors("base"), others, second, case.tensors("input"))
    return found


def walk(driver, case, method, dtype):
    """Yields (what was done, whose output, its golden, the output) of every step, the model being as it left it."""
    gauge = {}
    if method.tensors.gauges is not None:
        driver.build(case.base, case.tensors("base"), case.config, dtype, case=case.id)
        gauge = closest_gauge(driver, case)
    config, others = second_adapter(case, method)
    want = outputs(case, method, others, config)
    pair = (config, turned(others, gauge))
    for what, whose in steps(driver, case, method, turned(case.tensors("adapter"), gauge), pair, dtype):
        yield what, whose, want[whose], driver.forward(case.tensors("input"))


def state(driver) -> dict:
    names = driver.names()
    return {"active": list(driver.active()), "names": sorted(names), "trained": sorted(k for k in names if names[k])}


def check(driver, case, dtype, method):
    recorded = store.states()["cases"][case.id]
    for (what, whose, want, got), (name, active, names, trained) in zip(
            walk(driver, case, method, dtype), recorded["steps"], strict=True):
        assert what == name, "the steps are not the recorded ones: record them anew"
        close(f"after '{what}', which is to be that of {whose}, the output", got, want, dtype)
        now = state(driver)
        if now["active"] != active:
            raise Failure(f"after '{what}': the active adapters", expected=str(active), got=str(now["active"]))
        same_set(f"after '{what}': live parameter names", now["names"], recorded["names"][names])
        same_set(f"after '{what}': what is trained", now["trained"], recorded["trained"][trained])
    if method.merges:
        taken_off(driver, case, dtype, method)


def taken_off(driver, case, dtype, method):
    """Without merging, then merged: the base model's own parameters are there, and no other.

    Whether a module that was trained whole stays when nothing is merged, as in PEFT, or goes, is left open.
    """
    config, tensors = second_adapter(case, method)
    base, inputs = case.tensors("base"), case.tensors("input")
    own = parameters_of(case.base, base)
    driver.unload(merge=False)
    same_set("after unloading: live parameter names", driver.names(), own)
    left = formulas.with_saved_modules(base, tensors, config)
    for name, got in driver.weights().items():
        close(f"{name} after unloading", got, base[name], dtype, also=left[name])
    start(driver, case, dtype)
    driver.unload(merge=True)
    same_set("after merging and unloading: live parameter names", driver.names(), own)
    close("output after merging and unloading", driver.forward(inputs), case.tensors("out")["y"], dtype)
