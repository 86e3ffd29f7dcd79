"""`set_peft_model_state_dict` under the name of peft: it reports missing and unexpected keys."""

import importlib
import warnings

import pytest
import torch

from minipeft import compat

from . import harness as H
from .cases import CASES, each_case
from .cases.case import Case

ONE_OF_EACH = [next(c for c in CASES if c.method == m) for m in dict.fromkeys(c.method for c in CASES)]


@pytest.fixture(autouse=True)
def _not_for_peft(is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test alone")


@each_case(lambda c: c in ONE_OF_EACH and c.method != "p_tuning")  # whose network is not saved
def test_keys_are_reported_as_by_peft(ref, lib, case: Case):
    theirs, ours = H.pair(ref, lib, case)
    prompt = theirs.active_peft_config.is_prompt_learning
    state = {k: v.clone() for k, v in ref.get_peft_model_state_dict(theirs).items()}
    lacking = sorted(state)[-1]
    changed = {key: value * 2 if value.is_floating_point() else value for key, value in state.items()}
    if not prompt:  # of which peft wants every key
        del changed[lacking]
    changed |= {"base_model.model.nowhere.lora_A.weight": torch.ones(1), "stranger": torch.ones(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = ref.set_peft_model_state_dict(theirs, dict(changed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compat.set_peft_model_state_dict(ours, changed)
    assert {"base_model.model.nowhere.lora_A.weight", "stranger"} <= set(got.unexpected_keys)
    if prompt:
        return
    assert set(got.unexpected_keys) == set(want.unexpected_keys)
    assert set(got.missing_keys) <= set(want.missing_keys)
    assert len(got.missing_keys) == 1


def test_every_path_of_peft_offers_it(lib):
    """And minipeft's own, which judges, is the one that PeftModel uses."""
    for path, offers in compat.offered().items():
        found = offers.get("set_peft_model_state_dict", compat.set_peft_model_state_dict)
        assert found is compat.set_peft_model_state_dict, path
    own = importlib.import_module("minipeft").set_peft_model_state_dict
    model = H.adapt(lib, CASES[0])
    with pytest.raises(lib.PeftError, match="unexpected"):
        own(model, {**lib.get_peft_model_state_dict(model), "stranger": torch.ones(1)})
