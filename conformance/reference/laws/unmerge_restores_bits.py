"""Unmerging puts every bit of the base weights back, however often."""

import numpy as np

from ..compare import Failure

TITLE = "unmerge restores every bit"
CYCLES = 3


def applies(method):
    return method.merges


def check(driver, sample):
    sample.weights = {k: np.float32(v / 3) for k, v in sample.weights.items()}  # weights that use all their bits
    sample.start(driver)
    before = driver.weights()
    for _ in range(CYCLES):
        driver.merge()
        driver.unmerge()
    after = driver.weights()
    for name, want in before.items():
        changed = int((np.asarray(after[name]) != np.asarray(want)).sum())
        if changed:
            raise Failure(f"{changed} of {want.size} values of {name} differ after {CYCLES} merges and unmerges, "
                          f"config {sample.config}", expected="0", got=str(changed))
