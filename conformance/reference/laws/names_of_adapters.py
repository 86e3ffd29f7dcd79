"""Adapters may be called like parameters or modules: nothing is confused with them."""

import tempfile
from pathlib import Path

from .saved_side_by_side import load_and_compare, several

TITLE = "names of adapters"
MOST = 1
NAMES = ("weight", "up")  # a parameter, a module of the base


def applies(method):
    return not method.laws.single


def check(driver, sample):
    held, out = several(driver, sample, NAMES)
    with tempfile.TemporaryDirectory() as path:
        driver.save_adapters(path)
        load_and_compare(driver, sample, Path(path), held, out)
