"""Names: live parameters and buffers, what trains, counts, saved keys, shapes, dtypes and the saved config."""

import functools

import pytest
import torch

from . import harness as H
from .cases import each_case


def described(pairs):
    return {name: (tuple(t.shape), t.dtype) for name, t in pairs}


def fresh(case, *libraries):
    """A fresh model of each, the same for all tests of a case that only read it."""
    return [H.shared(case, library.__name__, functools.partial(H.adapt, library, case)) for library in libraries]


@each_case()
def test_live_names(case, lib, ref):
    theirs, ours = fresh(case, ref, lib)
    for what in ("named_parameters",) if case.own_buffers else ("named_parameters", "named_buffers"):
        H.same_names(described(getattr(ours, what)()), described(getattr(theirs, what)()))
        assert described(getattr(ours, what)()) == described(getattr(theirs, what)())
    H.same_names(ours.state_dict(), theirs.state_dict())
    assert described(ours.state_dict().items()) == described(theirs.state_dict().items())


@each_case()
def test_trainable_set(case, lib, ref):
    theirs, ours = fresh(case, ref, lib)
    wanted = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == wanted
    assert wanted
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@each_case()
def test_inference_mode_trains_nothing(case, lib, ref):
    kept = {}
    for name, module in (("want", ref), ("got", lib)):
        H.seed(0)
        model = module.get_peft_model(case.base.build(), H.config(module, case, inference_mode=True))
        kept[name] = {n for n, p in model.named_parameters() if p.requires_grad}
    assert kept["got"] <= kept["want"], "peft freezes all but trained biases and prompts"


@each_case()
def test_saved_keys_and_config(case, lib, ref, tmp_path):
    theirs, ours = fresh(case, ref, lib)
    want, want_config = H.saved(theirs, tmp_path / "want")
    got, got_config = H.saved(ours, tmp_path / "got")
    H.same_names(got, want)
    assert described(got.items()) == described(want.items())
    H.same_config(got_config, want_config)
    assert sorted(p.name for p in (tmp_path / "got").iterdir()) == sorted(p.name for p in (tmp_path / "want").iterdir())


@each_case()
def test_state_dict_of_the_adapter(case, lib, ref):
    theirs, ours = fresh(case, ref, lib)
    want, got = ref.get_peft_model_state_dict(theirs), lib.get_peft_model_state_dict(ours)
    H.same_names(got, want)
    assert described(got.items()) == described(want.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_case(lambda c: c.id.count("/") < 2 or c.id.endswith("/plain"))
def test_dtypes_follow_the_base(case, dtype, lib, ref):
    for options in ({}, {"autocast_adapter_dtype": False}):
        theirs, ours = H.adapt(ref, case, dtype=dtype, **options), H.adapt(lib, case, dtype=dtype, **options)
        assert described(ours.state_dict().items()) == described(theirs.state_dict().items())


@each_case()
def test_adapter_of_another_name(case, lib, ref):
    theirs, ours = H.adapt(ref, case, adapter_name="my-name"), H.adapt(lib, case, adapter_name="my-name")
    H.same_names(ours.state_dict(), theirs.state_dict())
    H.same_names(lib.get_peft_model_state_dict(ours, adapter_name="my-name"),
                 ref.get_peft_model_state_dict(theirs, adapter_name="my-name"))
    assert ours.active_adapter == theirs.active_adapter == "my-name"
    assert ours.active_adapters == theirs.active_adapters == ["my-name"]
