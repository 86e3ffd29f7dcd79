"""The recorded cases: names, keys, counts, forward, gradients, merge, unmerge, disable, save and load."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from ...driver import Driver, Unsupported
from ...reference import compare
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter
from ...reference.method import KEY, turned
from ...reference.methods import methods
from ...reference.store import Case


def start(driver: Driver, case: Case, dtype: str) -> dict:
    """The case's model with its adapter loaded, in the gauge that is returned."""
    driver.build(case.base, case.tensors("base"), case.config, dtype, case=case.id)
    put = driver.assign if case.data.get("live") else driver.load
    gauge = closest_gauge(driver, case)
    put(turned(case.tensors("adapter"), gauge))
    return gauge


def load_drawn(driver: Driver, method, rng, name: str = "default") -> dict:
    """Draw the tensors of an adapter that is there, but for frozen ones, and load them; gives them."""
    state = driver.state_dict(name)
    tensors = draw_adapter(method, state, {k for k in state if method.tensors.is_frozen(k)}, rng)
    driver.load(tensors, name)
    return tensors


def closest_gauge(driver: Driver, case: Case) -> dict:
    """Of the choices that a method leaves to an implementation, the one nearest to the golden; {}: there are none."""
    method, tensors = methods()[case.pack.data["method"]], case.tensors("adapter")
    if method.tensors.gauges is None:
        return {}

    def off(gauge):
        driver.load(turned(tensors, gauge))
        return compare.distance(driver.forward(case.tensors("input")), case.tensors("out")["y"], "float32")

    return min(method.tensors.gauges(case.config, case.targets), key=off)


def same_set(what, got, want):
    missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing or extra:
        parts = [f"missing {missing}"] * bool(missing) + [f"unexpected {extra}"] * bool(extra)
        raise Failure(f"{what}: " + "; ".join(parts), expected=str(sorted(want)), got=str(sorted(got)))


def other(case: Case, part: str):
    return case.tensors(part) if case.data.get("disputed") else {}


def names(driver, case, dtype):
    driver.build(case.base, case.tensors("base"), case.config, dtype, case=case.id)
    got = driver.names()
    same_set("live parameter names", got, case.parameters)
    wrong = [k for k, v in got.items() if bool(v) != case.parameters[k]]
    if wrong:
        raise Failure("trainable set: " + ", ".join(f"{k} should {'' if case.parameters[k] else 'not '}be trainable"
                                                    for k in wrong))


def keys(driver, case, dtype):
    driver.build(case.base, case.tensors("base"), case.config, dtype, case=case.id)
    if driver.info().get("mapped_keys"):
        raise Unsupported("its keys are its own; the driver maps them")
    got = driver.state_dict()
    same_set("saved keys", got, case.keys)
    wrong = {k: list(got[k].shape) for k, shape in case.keys.items() if list(got[k].shape) != shape}
    if wrong:
        raise Failure("shapes of saved tensors", expected=str({k: case.keys[k] for k in wrong}), got=str(wrong))
    for k, want in case.tensors("fresh").items():
        close(f"{k} of a new adapter", got[k], want, dtype)


def count(driver, case, dtype):
    driver.build(case.base, case.tensors("base"), case.config, dtype, case=case.id)
    got = list(driver.count())
    if got != case.count:
        raise Failure("parameter counts (trainable, all)", expected=str(case.count), got=str(got))


def forward(driver, case, dtype):
    start(driver, case, dtype)
    close("output", driver.forward(case.tensors("input")), case.tensors("out")["y"], dtype,
          other(case, "paper").get("y"))


def gradients(driver, case, dtype):
    gauge = start(driver, case, dtype)
    take = driver.live_gradients if case.data.get("live") else driver.gradients
    got = take(case.tensors("input"), case.tensors("cotangent")["y"])
    want, also = turned(case.tensors("grad"), gauge), other(case, "paper_grad")
    same_set("tensors with a gradient", got, want)
    if case.golden == "formula" and dtype == "float64":
        dtype = "float32"  # the golden is a finite difference
    for k in want:
        # Another answer of a disputed case is a finite difference, too.
        other_dtype = "float32" if dtype == "float64" else dtype
        if k in also and compare.distance(got[k], also[k], other_dtype, floor=1) <= 1:
            continue
        close(f"gradient of {k}", got[k], want[k], dtype, floor=1)


def merge(driver, case, dtype):
    start(driver, case, dtype)
    before = driver.weights()
    driver.merge()
    got, want, also = driver.weights(), case.tensors("merged"), other(case, "paper_merged")
    for k in before:
        if k in want:
            close(f"merged {k}", got[k], want[k], dtype, also.get(k))
        elif f"{KEY}{k}" not in case.keys and not np.array_equal(got[k], before[k]):
            raise Failure(f"merging changed {k}, which is not adapted")
    close("output after merging", driver.forward(case.tensors("input")), case.tensors("out")["y"], dtype,
          other(case, "paper").get("y"))


def unmerge(driver, case, dtype):
    """Back within rounding; whether every bit is back is a law of its own."""
    start(driver, case, dtype)
    before = driver.weights()
    driver.merge()
    driver.unmerge()
    after = driver.weights()
    for k in before:
        close(f"{k} after unmerging", after[k], before[k], dtype)
    close("output after unmerging", driver.forward(case.tensors("input")), case.tensors("out")["y"], dtype,
          other(case, "paper").get("y"))


def disable(driver, case, dtype):
    start(driver, case, dtype)
    trained = trained_of(driver)
    driver.disable(True)
    close("output while disabled", driver.forward(case.tensors("input")), case.tensors("plain")["y"], dtype)
    driver.disable(False)
    close("output when enabled again", driver.forward(case.tensors("input")), case.tensors("out")["y"], dtype,
          other(case, "paper").get("y"))
    same_set("what is trained when it was disabled and is enabled again", trained_of(driver), trained)


def trained_of(driver) -> list:
    try:
        return [k for k, on in driver.names().items() if on]
    except Unsupported:  # what has no live names can be disabled all the same
        return []


def save(driver, case, dtype):
    driver.build(case.base, case.tensors("base"), case.config, dtype, case=case.id)
    # The recorded tensors fit into 16 bits; these do not, so that rounding on the way to disk shows. Whole numbers are
    # places in a matrix, and stay.
    tensors = {k: (np.asarray(v, np.float64) * (1 + 2**-14 if (v % 1).any() else 1)).astype(np.float32)
               for k, v in case.tensors("adapter").items()}
    if case.data.get("live"):
        driver.assign(tensors)
        tensors = driver.state_dict()
    else:
        driver.load(tensors)
    before = driver.forward(case.tensors("input"))
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        config, weights = Path(path, "adapter_config.json"), Path(path, "adapter_model.safetensors")
        for file in (config, weights):
            if not file.exists():
                raise Failure(f"saving wrote no {file.name}", got=str(sorted(p.name for p in Path(path).iterdir())))
        compare_files(case, config, weights, tensors)
        driver.restore(path, case.base, case.tensors("base"), dtype)
        close("output after saving and loading", driver.forward(case.tensors("input")), before, dtype)


def compare_files(case, config, weights, tensors):
    from safetensors.numpy import load_file

    found = json.loads(config.read_text())
    for field, want in case.config.items():
        got = found.get(field)
        if isinstance(want, list) and isinstance(got, list):
            got, want = sorted(map(str, got)), sorted(map(str, want))
        if got != want and not (field == "target_modules" and want == "all-linear"):
            raise Failure(f"adapter_config.json: {field}", expected=repr(want), got=repr(got))
    stored = load_file(weights)
    same_set("keys in adapter_model.safetensors", stored, case.keys)
    for k, want in tensors.items():
        if not np.array_equal(stored[k], want):
            raise Failure(f"adapter_model.safetensors: {k} is not what was loaded: "
                          + compare.first_difference(stored[k], want))


# name -> (function, does it run in every dtype, what a case must have)
CHECKS = {
    "names": (names, False), "keys": (keys, False), "count": (count, False), "forward": (forward, True),
    "gradients": (gradients, True), "merge": (merge, True), "unmerge": (unmerge, False),
    "disable": (disable, False), "save": (save, False),
}


def applies(case: Case, check: str) -> bool:
    if check == "gradients" and case.config.get("inference_mode"):
        return False
    return case.merges or check not in ("merge", "unmerge")
