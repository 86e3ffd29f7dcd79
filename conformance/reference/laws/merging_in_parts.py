"""Merging by name, one adapter after another, what is merged already; disabling and switching while merged."""

import numpy as np

TITLE = "merging in parts"
MOST = 2


def applies(method):
    return method.merges and not method.laws.single


def check(driver, sample):
    plain, before = sample.base_output(driver), driver.weights()
    sample.start(driver)
    first = driver.forward(sample.inputs)
    driver.merge()
    alone = driver.weights()
    sample.start(driver)
    sample.second(driver)
    driver.switch(["other"])
    out = driver.forward(sample.inputs)
    driver.merge()
    driver.disable(True)
    sample.same("output of a merged adapter that is disabled", driver.forward(sample.inputs), plain)
    driver.disable(False)
    sample.same("output of a merged adapter that is enabled again", driver.forward(sample.inputs), out)
    driver.merge()
    driver.switch(["default"])
    sample.same("output after switching from a merged adapter", driver.forward(sample.inputs), first)
    same_weights(sample, "switching from a merged adapter", driver, before)
    driver.switch(["other"])
    driver.merge(["default"])
    same_weights(sample, "the adapter that is named is merged, which is not the active one", driver, alone)
    driver.unmerge()
    same_weights(sample, "unmerging what was merged by name", driver, before)
    sample.same("output after it", driver.forward(sample.inputs), out)
    if sample.method.laws.together:
        driver.switch(["default", "other"])
        both = driver.forward(sample.inputs)
        driver.merge(["default"])
        driver.merge(["other"])
        sample.same("output of two adapters merged one after the other", driver.forward(sample.inputs), both)
        driver.merge(["default"])
        sample.same("output after merging again what is merged", driver.forward(sample.inputs), both)
        driver.unmerge()
        same_weights(sample, "unmerging both", driver, before)
        sample.same("output after unmerging both", driver.forward(sample.inputs), both)


def same_weights(sample, what, driver, want):
    for name, got in driver.weights().items():
        sample.same(f"{what}: {name}", np.asarray(got), np.asarray(want[name]))
