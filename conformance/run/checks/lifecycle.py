"""A trace through an adapter's life, with a golden at every step."""

from __future__ import annotations

import tempfile

from ...reference.compare import close
from ...reference.method import turned
from .goldens import closest_gauge


def steps(driver, method, base, weights, config, second, adapter, other, inputs, dtype, case=""):
    """Walk the trace; yields (what was done, output). `second` and `other`: another adapter's config and tensors."""
    def now():
        return driver.forward(inputs)

    driver.build(base, weights, config, dtype, case=case)
    driver.load(adapter)
    yield "load", now()
    if method.merges:
        driver.merge()
        yield "merge", now()
        driver.unmerge()
        yield "unmerge", now()
    driver.add("other", second)
    yield "add another", now()
    driver.load(other, "other")
    yield "load it, not yet active", now()
    driver.switch(["other"])
    yield "switch to it", now()
    if method.merges:
        driver.merge(["other"])
        yield "merge it", now()
        driver.unmerge()
    if method.laws.stacks:
        driver.switch(["default", "other"])
        yield "both active", now()
        if method.merges:
            driver.merge()
            yield "merge both", now()
            driver.unmerge()
            yield "unmerge both", now()
    driver.switch(["default"])
    yield "switch back", now()
    driver.disable(True)
    yield "disable", now()
    driver.disable(False)
    yield "enable", now()
    driver.delete("other")
    yield "delete the other", now()
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, base, weights, dtype)
    yield "save and reload", now()
    if method.merges:
        driver.unload(merge=True)
        yield "merge and unload", now()


def trace(driver, case, dtype, method):
    golden, names = case.tensors("trace"), case.data["trace"]
    driver.build(case.base, case.tensors("base"), case.config, dtype, case=case.id)
    gauge = closest_gauge(driver, case)
    adapter, second = (turned(case.tensors(part), gauge) for part in ("adapter", "second"))
    walk = steps(driver, method, case.base, case.tensors("base"), case.config, case.second, adapter, second,
                 case.tensors("input"), dtype, case.id)
    for i, (name, got) in enumerate(walk):
        assert name == names[i], "the trace is not the recorded one: record it anew"
        close(f"step {i + 1}, after '{name}'", got, golden[str(i)], dtype)
