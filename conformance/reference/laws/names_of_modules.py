"""Modules may be called like parts of the names that PEFT makes: the same model under other names is the same."""

import tempfile

from ..compare import Failure
from .saved_side_by_side import same_tensors

TITLE = "names of modules"
MOST = 1
NAMES = {"up": "default", "mid": "weight", "low": "lora"}


def applies(method):
    others = {k: v for k, v in method.laws.draw.items() if k != "target_modules"}
    named = method.laws.draw.get("target_modules") == [["up", "mid"]] and "up" not in str(others)
    return named and not method.tensors.exact  # those have values that follow from the names


def check(driver, sample):
    plain = sample.on("names", target_modules=list(NAMES))
    plain.start(driver)
    out, tensors = driver.forward(plain.inputs), {renamed(k): v for k, v in driver.state_dict().items()}
    named = plain.on("awkward-names", target_modules=list(NAMES.values()))
    named.build(driver)
    if set(driver.state_dict()) != set(tensors):
        raise Failure(f"saved keys of modules called {[*NAMES.values()]}, config {named.config}",
                      expected=str(sorted(tensors)), got=str(sorted(driver.state_dict())))
    driver.load(tensors)
    what = f"of modules called {[*NAMES.values()]}"
    named.same(f"output {what}", driver.forward(named.inputs), out)
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, named.base, named.weights, named.dtype)
    same_tensors(named, f"the adapter {what}, saved and loaded,", driver.state_dict(), tensors)
    named.same(f"output {what} after loading", driver.forward(named.inputs), out)
    if named.method.merges:
        driver.unload(merge=True)
        named.same(f"output {what} after merging", driver.forward(named.inputs), out)


def renamed(key):
    return ".".join(NAMES.get(part, part) for part in key.split("."))
