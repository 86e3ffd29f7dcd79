"""The wavelet filters are what their names say: orthonormal, with the vanishing moments of their family."""

import pytest
import torch

from minipeft.maths.wavelets import inverse_transform, low_pass, taps

FAMILIES = [*(f"db{n}" for n in range(1, 39)), *(f"sym{n}" for n in range(2, 21)), "coif1", "coif2", "coif3", "coif5"]
LOOSE = {f"db{n}" for n in range(20, 39)} | {"sym19", "sym20"}  # roots of high order, found in float64


@pytest.mark.parametrize("family", FAMILIES)
def test_orthonormal_with_vanishing_moments(family):
    h = torch.tensor(low_pass(family), dtype=torch.float64)
    tolerance = 5e-6 if family in LOOSE else 1e-11
    assert len(h) == taps(family)
    assert abs(h.sum() - 2**0.5) < tolerance
    for shift in range(len(h) // 2):
        assert abs(h[2 * shift :] @ h[: len(h) - 2 * shift] - float(shift == 0)) < tolerance
    moments = taps(family) // 3 if family.startswith("coif") else taps(family) // 2
    signs = 1 - 2.0 * (torch.arange(len(h)) % 2)
    x = torch.arange(len(h), dtype=torch.float64) / len(h)
    for k in range(min(moments, 6)):
        assert abs((signs * h.flip(0) * x**k).sum()) < tolerance


@pytest.mark.parametrize("n", range(2, 11))
def test_sym_is_less_asymmetric_than_db(n):
    """The same length and smoothness, with the energy nearer to the middle."""

    def asymmetry(family):
        h = torch.tensor(low_pass(family), dtype=torch.float64)
        return min((h - other).abs().sum() for other in (h.flip(0).roll(s) for s in range(-len(h) // 2, len(h) // 2)))

    assert asymmetry(f"sym{n}") <= asymmetry(f"db{n}") + 1e-12


def test_coif4_is_not_the_wavelet_but_that_of_peft():
    assert sum(low_pass("coif4")) == pytest.approx(1.4485, abs=1e-4)


@pytest.mark.parametrize("family", ["db1", "db4", "sym5", "coif2"])
def test_inverse_transform_keeps_the_norm_inside(family):
    """An orthonormal basis: coefficients away from the border have the energy of what they stand for."""
    margin = taps(family) // 2
    S = torch.zeros(64, 48, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for a in (0, 32):
        for b in (0, 24):
            rows, columns = slice(a + margin, a + 32 - margin), slice(b + margin, b + 24 - margin)
            S[rows, columns] = torch.randn(S[rows, columns].shape, generator=g, dtype=torch.float64)
    positions = S.nonzero().t()
    D = inverse_transform(S[tuple(positions)], positions, *S.shape, family)
    assert D.shape == (64 + 2 - taps(family), 48 + 2 - taps(family))
    assert D.norm() == pytest.approx(S.norm().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["haar", "db0", "db39", "sym1", "coif18", "bior2.2", "db", "xdb2", "db02"])
def test_names_of_no_family(name):
    with pytest.raises(ValueError, match="wavelet family"):
        taps(name)
