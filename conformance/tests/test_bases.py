"""What adapters take from the base, as far as it is determined.

FRoD's recorded V is that of the formula up to the signs of its columns; with a single layer, only V V^T = W^T W is.
PSOFT's singular vectors may have other signs than those of the recorder.
"""

import numpy as np
import pytest

from ..drivers.oracle import Oracle
from ..reference import numpy_model, store
from ..reference.compare import distance
from ..reference.method import Fault
from ..reference.methods import frod, psoft
from ..run.checks import goldens, lifecycle

CASES = store.packs()["frod"].cases


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_shared_basis(case):
    at, stored = numpy_model.sites(case.base, case.tensors("base")), case.tensors("adapter")
    for key, value in frod.made(case.config, [at[path] for path in case.targets]).items():
        assert stored[key].shape == value.shape
        if frod.SHARED[0] in key:
            V = stored[key]
            assert np.allclose(V @ V.T, value @ value.T, rtol=0, atol=1e-5 * np.abs(V).max() ** 2)
            if "/blocks/" in case.id:
                signs = np.sign((V * value).sum(0))
                assert np.allclose(V, signs * value, rtol=0, atol=1e-3 * np.abs(V).max())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_entries_are_off_the_diagonal(case):
    for key, value in case.tensors("adapter").items():
        if frod.SHARED[1] in key:
            row, column = value.astype(int)
            assert (row != column).all() and len(set(zip(row, column))) == len(row)


def other_signs(site, t, c, frozen=None):
    """PSOFT by a LAPACK that turns every second pair of singular vectors."""
    signs = np.where(np.arange(c["r"]) % 2, -1.0, 1.0)
    both = np.outer(signs, signs)
    both = both[np.triu_indices(c["r"], 1)] if psoft.orthogonal(c) else both
    return psoft.formula(site, {**t, psoft.Q: t[psoft.Q] * both}, c, frozen)


@pytest.mark.parametrize("check", ["forward", "gradients", "merge", "save"])
@pytest.mark.parametrize("case", store.packs()["psoft"].cases, ids=lambda c: c.id)
def test_signs_of_singular_vectors_are_free(case, check):
    """PSOFT's goldens hold for every choice, and the choice matters."""
    driver = Oracle(Fault("other-signs", "none: another choice", {"formula": other_signs}))
    goldens.CHECKS[check][0](driver, case, "float32")
    driver.load(case.tensors("adapter"))
    assert distance(driver.forward(case.tensors("input")), case.tensors("out")["y"], "float32") > 100


def test_a_lifecycle_in_other_signs():
    driver = Oracle(Fault("other-signs", "none: another choice", {"formula": other_signs}))
    case = store.find("psoft/linear/plain")
    lifecycle.trace(driver, case, "float32", method=psoft.METHOD)
