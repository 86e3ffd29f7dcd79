"""Twice the scale is twice the change of every weight."""

import numpy as np

TITLE = "linearity in the scale"


def applies(method):
    return method.laws.scales and method.merges


def check(driver, sample):
    changes = []
    for factor in (1, 2):
        sample.start(driver)
        before = driver.weights()
        driver.scale(factor)
        driver.merge()
        after = driver.weights()
        changes.append({k: np.asarray(after[k], np.float64) - before[k] for k in before})
    for name, once in changes[0].items():
        if once.any():
            sample.same(f"change of {name} at scale 2 against twice that at scale 1", changes[1][name] / 2, once)
