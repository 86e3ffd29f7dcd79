"""What FRoD's adapters take from the base: the recorded basis V is that of the formula, as far as it is determined.

With several layers that is up to the signs of its columns. With one, only V V^T = W^T W is.
"""

import numpy as np
import pytest

from .. import numpy_model, store
from ..methods import frod

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
