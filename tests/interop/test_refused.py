"""What peft refuses stands apart from the table: here it is proven that peft does refuse it.

The module under test may refuse too (with an error that says why, and the model left as it was), or do better; then
what it does must obey the law: running it equals merging it.
"""

import pytest
import torch

from . import harness as H
from .cases import REFUSED

ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError)
each_refused = pytest.mark.parametrize("case", REFUSED, ids=[c.id for c in REFUSED])


def batch_of(case, dtype=torch.float32):
    return {**case.base.inputs(dtype), **case.inputs}


def reach(module, case, step):
    """Do what the case does up to and with its step."""
    model = module.get_peft_model(case.base.build(), getattr(module, case.config)(**case.kwargs)).eval()
    if step == "run":
        H.run(model, batch_of(case))
    elif step == "merge":
        model.merge_adapter()
    elif step == "second":
        model.add_adapter("other", getattr(module, case.config)(**case.kwargs))
        model.set_adapter("other")
        H.run(model, batch_of(case))
    return model


@each_refused
def test_peft_refuses(case, ref):
    with pytest.raises((*ERRORS, AttributeError)) as raised:
        reach(ref, case, case.step)
    assert type(raised.value).__name__ == case.error or case.error in [c.__name__ for c in type(raised.value).__mro__]


@each_refused
def test_refused_or_lawful(case, lib, is_ref):
    if is_ref:
        pytest.skip("peft is asked in test_peft_refuses")
    base = case.base.build()
    before = H.snapshot(base)
    try:
        model = lib.get_peft_model(base, getattr(lib, case.config)(**case.kwargs)).eval()
    except ERRORS as error:
        assert str(error), "a refusal says why"
        H.identical(H.snapshot(base), before)
        return
    try:
        model = H.move(model).double()
        batch = batch_of(case, torch.float64)
        running = H.run(model, batch)
        if case.step == "second":
            reach(lib, case, "second")
        model.merge_adapter()
    except ERRORS as error:
        assert str(error), "a refusal says why"
        return
    H.close(H.run(model, batch), running, 2e-6 if case.base.float32_inside else 1e-10)
