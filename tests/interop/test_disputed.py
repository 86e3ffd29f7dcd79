"""Every entry of `disputed` is evidence against peft: it is caught at it here, so that no entry outlives its reason."""

import pytest
import torch

from . import harness as H
from .cases import CASES
from .test_outputs import agrees_with_differences

ENTRIES = [(c, what) for c in CASES for what in c.disputed]
IDS = [f"{c.id}-{what}" for c, what in ENTRIES]
DOUBLE = torch.float64


def moved(ref, case):
    return H.move(H.adapt(ref, case), case.scale).double()


def base_output(case):
    return H.run(case.base.build(DOUBLE), H.inputs(case, DOUBLE))


def fresh(ref, case):
    return H.differ(H.run(H.adapt(ref, case).double(), H.inputs(case, DOUBLE)), base_output(case), 1e-3)


def merged_is_not_running(ref, case, second=False):
    model = moved(ref, case)
    if second:
        model = H.add(ref, H.adapt(ref, case), case, "other")
        model = H.move(model, case.scale, only=H.adapter_or_trainable).double()
        model.base_model.set_adapter(["default", "other"])
    running = H.run(model, H.inputs(case, DOUBLE))
    model.merge_adapter()
    # transformers' own float32 arithmetic hides differences below its rounding
    return H.differ(H.run(model, H.inputs(case, DOUBLE)), running, 1e-7)


def disabled(ref, case):
    model = moved(ref, case)
    try:
        with model.disable_adapter():
            return H.differ(H.run(model, H.inputs(case, DOUBLE)), base_output(case), 1e-3)
    except UnboundLocalError:
        return True


def restore(ref, case):
    try:
        H.identical(moved(ref, case).unload().state_dict(), case.base.build(DOUBLE).state_dict())
    except (AssertionError, AttributeError):
        return True
    return False


def gradients(ref, case):
    model = moved(ref, case)
    try:
        agrees_with_differences(model, case, H.gradients(model, H.inputs(case, DOUBLE)), DOUBLE)
    except AssertionError:
        return True
    return False


def running_writes(ref, case):
    model = H.move(H.adapt(ref, case), case.scale)
    before = H.snapshot(model)
    H.run(model, H.inputs(case))
    try:
        H.identical(H.snapshot(model), before)
    except AssertionError:
        return True
    return False


def reload(ref, case):
    one, two = (H.snapshot(H.adapt(ref, case, at=seed)) for seed in (0, 1))
    return any(".base_layer." in name and not torch.equal(one[name], two[name]) for name in one)


def wrong_output(ref, case):
    return merged_is_not_running(ref, case) or gradients(ref, case)


def moved_along(ref, case):
    model = H.add(ref, H.adapt(ref, case), case, "other").double()
    model.set_adapter("other")
    try:
        H.run(model, H.inputs(case, DOUBLE))
    except RuntimeError:
        return True
    return False


def low_memory(ref, case):
    try:
        H.adapt(ref, case, low_cpu_mem_usage=True)
    except NotImplementedError:
        return True
    return False


EVIDENCE = {
    "fresh": fresh,
    "outputs": wrong_output,
    "merge": wrong_output,
    "several": lambda ref, case: merged_is_not_running(ref, case, second=True),
    "disabled": disabled,
    "restore": restore,
    "gradients": gradients,
    "running writes": running_writes,
    "reload": reload,
    "moved": moved_along,
    "low memory": low_memory,
}


@pytest.mark.parametrize("case, what", ENTRIES, ids=IDS)
def test_peft_breaks_its_law(case, what, ref):
    assert EVIDENCE[what](ref, case), f"peft keeps the law here: strike {what!r} from {case.id}"
