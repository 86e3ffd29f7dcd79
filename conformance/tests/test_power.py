"""Every seeded fault is caught, and no case could let one slip through."""

import pytest

from conformance.reference import store
from conformance.reference.faults import all_faults
from conformance.reference.method import Fault
from conformance.reference.methods import methods
from conformance.run import plan, power


def test_there_are_faults_of_every_method():
    assert {m.name for m, _ in all_faults()} == set(methods())


@pytest.mark.parametrize("method, fault", [pytest.param(m, f, id=f"{m.name}/{f.id}") for m, f in all_faults()])
def test_every_fault_is_caught(method, fault):
    (row,) = power.kill_matrix([(method, fault)])
    assert row["caught"], row["missed"]


def test_a_fault_that_is_broken_catches_nothing(monkeypatch):
    """What crashes because the suite changed under it would otherwise count as caught."""
    broken = Fault("broken", "none", {"forward": lambda o, right, inputs, names=None: o.no_such_thing}, ("forward",),
                   ("linear/plain",))
    monkeypatch.setattr(power, "all_faults", lambda: [(methods()["lora"], broken)])
    (row,) = power.kill_matrix()
    assert not row["caught"] and "the fault itself is broken" in row["missed"][0]


def test_fault_ids_are_unique_and_links_are_links():
    ids = [f"{m.name}/{f.id}" for m, f in all_faults()]
    assert len(ids) == len(set(ids))
    assert all(f.link.startswith("https://") for _, f in all_faults() if f.link)


def test_the_cases_that_faults_name_are_there():
    known = {task.case for task in plan.tasks("full")}
    named = {f"{m.name}/{case}" for m, fault in all_faults() for case in fault.cases}
    assert not named - known


def test_margins():
    for case in store.all_cases():
        assert case.margin >= 10, f"{case.id}: {case.nearest_fault} is {case.margin} tolerances away"
        assert case.effect >= 0.05, f"{case.id} is trivial: the adapter changes the output by {case.effect}"


def test_a_scale_error_of_a_thousandth_is_caught_in_float32():
    assert power.smallest_scale_error()["float32"] < 1e-3
