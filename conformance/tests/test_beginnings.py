"""The recorded beginnings follow from NumPy where there is a closed form."""

import numpy as np
import pytest

from conformance.reference import store
from conformance.reference.bases import BASES
from conformance.reference.beginnings import described, difference, drawn
from conformance.reference.draw import draw_base, rng_of

ROWS = {(r["method"], r["id"]): r for r in store.rows("beginnings")}
WIDE = draw_base(BASES["wide"], rng_of("wide"))
LAYERS = {"up": 48, "mid": 96}


def tensor(method, id, slot):
    return ROWS[method, id]["tensors"]["base_model.model." + slot]


@pytest.mark.parametrize("layer", LAYERS)
def test_lora_is_kaiming_uniform_and_zero(layer):
    A = tensor("lora", "default", f"{layer}.lora_A.weight")
    assert A["std"] == pytest.approx(1 / np.sqrt(3 * LAYERS[layer]), rel=0.03)
    assert A["kurtosis"] == pytest.approx(-1.2, abs=0.1)
    assert not any(tensor("lora", "default", f"{layer}.lora_B.weight")["at"])


@pytest.mark.parametrize("layer", LAYERS)
def test_gaussian_has_the_deviation_of_one_over_r(layer):
    A = tensor("lora", "gaussian", f"{layer}.lora_A.weight")
    assert A["std"] == pytest.approx(1 / 16, rel=0.03) and A["kurtosis"] == pytest.approx(0, abs=0.15)


def holds(want, value, signs=True):
    assert difference(value, want, signs, True) is None, difference(value, want, signs, True)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("id, scale", [("pissa", 6 / 16), ("pissa-rslora", 6 / 4)])
def test_pissa_is_the_first_singular_vectors(layer, id, scale):
    W = WIDE[f"{layer}.weight"]
    U, S, V = (x.astype(np.float64) for x in np.linalg.svd(W, full_matrices=False))
    root = np.sqrt(S[:16] / scale)
    A, B = root[:, None] * V[:16], U[:, :16] * root
    holds(tensor("lora", id, f"{layer}.lora_A.weight"), A)
    holds(tensor("lora", id, f"{layer}.lora_B.weight"), B)
    holds(ROWS["lora", id]["weights"][f"{layer}.weight"], W - scale * B @ A, signs=False)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("id, scale", [("olora", 6 / 16), ("olora-scaled", 48 / 16)])
def test_olora_is_the_qr_decomposition(layer, id, scale):
    W = WIDE[f"{layer}.weight"]
    Q, R = np.linalg.qr(W)
    holds(tensor("lora", id, f"{layer}.lora_A.weight"), R[:16])
    holds(tensor("lora", id, f"{layer}.lora_B.weight"), Q[:, :16])
    holds(ROWS["lora", id]["weights"][f"{layer}.weight"], W - scale * Q[:, :16] @ R[:16], signs=False)


@pytest.mark.parametrize("layer", LAYERS)
def test_doras_magnitude_is_the_norm_of_each_row(layer):
    holds(tensor("dora", "default", f"{layer}.lora_magnitude_vector"), np.linalg.norm(WIDE[f"{layer}.weight"], axis=1))


@pytest.mark.parametrize("id, value", [("default", 0.1), ("d-initial", 1.5)])
def test_d_initial(id, value):
    holds(tensor("vera", id, "up.vera_lambda_d"), np.full(16, value))


@pytest.mark.parametrize("seed", range(5))
def test_right_values_pass_and_wrong_ones_do_not(seed):
    rng = np.random.default_rng(seed)
    normal, other = rng.normal(size=(8, 40, 40)), rng.uniform(-1, 1, (40, 40)) * np.sqrt(3)
    want = described(list(normal), False, False)
    assert difference(rng.normal(size=(40, 40)), want, False, False) is None
    assert difference(drawn(want, rng), want, False, False) is None
    for wrong in (1.3 * normal[0], normal[0] + 0.4, other, normal[0] * np.nan, normal[0].T[:20]):
        assert difference(wrong, want, False, False) is not None
