"""What the checks of usage rest on: nothing in them is empty, or decided by rounding."""

import numpy as np
import pytest

from conformance.reference import store
from conformance.reference.combine import combined, pruned, ties
from conformance.reference.methods import methods
from conformance.run.checks import usage


@pytest.mark.parametrize("case", [*usage.GENERATED, usage.FROM_PADDED])
def test_generated_ids_are_not_near_others(case):
    case = store.find(case)
    method = methods()[case.pack.data["method"]]
    ids, gap = usage.likeliest(case, method, usage.telling(case))
    read = 1 if "decoder" in case.id else case.tensors("input")["input_ids"].shape[1]
    assert gap > 0.02 and ids.shape[1] == read + usage.NEW_TOKENS
    assert (usage.likeliest(case, methods()["lora"], {})[0] != ids).any(), "the base model says the same"


def test_what_is_not_a_number_reaches_every_method_but_two():
    merging = {m.name: usage.first_case(m) for m in methods().values() if m.merges}
    state = {name: {k: np.empty(s) for k, s in case.keys.items()} for name, case in merging.items()}
    without = {name for name, case in merging.items() if not usage.live_shapes(case, state[name])}
    assert without == {"tinylora", "unilora"}


def test_every_method_is_there():
    seen = {(m.name, what) for m, what, _ in usage.everything()}
    assert len(seen) == len(list(usage.everything()))
    assert {name for name, what in seen if what == "is-trainable"} == set(methods())


def test_pruning_and_ties_by_hand():
    assert pruned(np.array([[1.0, -3.0], [2.0, 0.5]]), 0.5).tolist() == [[0, -3], [2, 0]]
    parts = [np.array([3.0, 1.0, 1.0]), np.array([-1.0, 2.0, -4.0])]
    assert ties(parts, [1.0, 1.0]).tolist() == [3.0, 1.5, -4.0]
    assert ties([*parts, np.array([-1.0, 1.0, 2.0])], [1.0, 1.0, 2.0], "frequency").tolist() == [-1.5, 5 / 3, 2.5]


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_combinations_add_up(kind):
    rng = np.random.default_rng(0)
    factors = [(rng.normal(size=(2, 5)), rng.normal(size=(4, 2)), s) for s in (0.5, 3.0)]
    A, B = combined(factors, [0.75, -2.0], kind, **({"svd_rank": 4} if kind == "svd" else {}))
    np.testing.assert_allclose(B @ A, sum(w * s * b @ a for w, (a, b, s) in zip([0.75, -2.0], factors)), atol=1e-12)
