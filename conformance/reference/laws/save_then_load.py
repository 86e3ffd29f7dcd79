"""A saved adapter, loaded onto a new base model, is the same adapter."""

import tempfile

import numpy as np

from ..compare import Failure

TITLE = "save -> load"


def applies(method):
    return True


def check(driver, sample):
    sample.start(driver)
    before, out = driver.state_dict(), driver.forward(sample.inputs)
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, sample.base, sample.weights, sample.dtype)
    after = driver.state_dict()
    for name, want in before.items():
        if name not in after or not np.array_equal(after[name], want):
            raise Failure(f"{name} is not what was saved, config {sample.config}")
    sample.same("output after loading", driver.forward(sample.inputs), out)
