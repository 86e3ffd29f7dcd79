"""A model that is dropped goes at once, with all of its tensors: nothing waits for Python to look for cycles."""

import copy
import gc
import weakref

import pytest
import torch

from . import harness as H
from .cases import each_case, firsts

HOOKED = {"shadow"}  # hooks on the base model keep its tuner, which keeps the base model
KEPT_BY_PEFT = {"monteclora", "oft", "osf", "shira", "supertuning"}  # their layers there refer to themselves


EACH_METHOD, EACH_BASE = firsts(1), firsts(2)


@pytest.fixture
def uncollected():
    gc.disable()  # what is made now goes by its count of references, or stays
    yield
    gc.enable()


def used(lib, case):
    """The case's model, trained for a step and (where that is possible) merged, and references to its tensors."""
    model = H.adapt(lib, case)
    if case.second is not None:
        H.add(lib, model, case, "other")
    H.gradients(model, H.inputs(case))
    if case.merges and "layer_replication" not in case.kwargs:
        model.merge_adapter()
    return model, {name: weakref.ref(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


@each_case(lambda case: case.id in EACH_BASE and case.id.split("/")[0] not in HOOKED)
def test_a_dropped_model_goes_at_once(case, lib, is_ref, uncollected):
    if is_ref and case.id.split("/")[0] in KEPT_BY_PEFT:
        pytest.skip("the reference keeps it until Python looks for cycles")
    for _ in range(2):  # libraries keep something of the first model of a kind
        model, references = used(lib, case)
        del model
        alive = [name for name, reference in references.items() if reference() is not None]
    assert not alive


@each_case(lambda case: case.id in EACH_METHOD)
def test_a_copy_stands_alone(case, lib):
    """Its adapters are on its own layers: it runs and merges as the original did, whatever becomes of that."""
    model = H.move(H.adapt(lib, case))
    want = H.run(model, H.inputs(case))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    H.close(H.run(twin, H.inputs(case)), want, 0)
    if case.merges:
        twin.merge_adapter()
        H.close(H.run(twin, H.inputs(case)), want, H.tolerance(case, torch.float32))
