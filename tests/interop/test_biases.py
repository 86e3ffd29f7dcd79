"""Trained biases (`bias="all"`, `"..._only"`): those of the model itself, and never those of another adapter."""

import warnings

import pytest
import torch
from torch import nn

from . import harness as H

FIELDS = {
    "lora": ("LoraConfig", "lora_only", {"r": 2}),
    "oft": ("OFTConfig", "oft_only", {"oft_block_size": 3}),
    "boft": ("BOFTConfig", "boft_only", {"boft_block_size": 3}),
    "hra": ("HRAConfig", "hra_only", {"r": 2}),
    "miss": ("MissConfig", "MiSS_only", {"r": 2}),
    "fourierft": ("FourierFTConfig", "fourier_only", {"n_frequency": 4}),
    "adalora": ("AdaLoraConfig", "lora_only", {"init_r": 2, "total_step": 9}),
}
each_method = pytest.mark.parametrize("method", FIELDS)
each_bias = pytest.mark.parametrize("bias", ["all", "only"])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(3, 3))


def config(lib, method, bias, target="0", **changes):
    kind, only, fields = FIELDS[method]
    return getattr(lib, kind)(target_modules=[target], bias=only if bias == "only" else bias, **fields, **changes)


def trained(lib, method, bias):
    """A model with a copy of one module, trained biases, and a second adapter on another module."""
    H.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = H.move(lib.get_peft_model(net(), config(lib, method, bias, modules_to_save=["2"]))).eval()
        before = {k: v.clone() for k, v in lib.get_peft_model_state_dict(model).items()}
        model.add_adapter("other", config(lib, method, "none", "1", inference_mode=method == "adalora"))
    return model, before


@each_method
@each_bias
def test_what_is_saved_does_not_depend_on_which_adapter_is_on(method, bias, lib, is_ref):
    if is_ref:
        pytest.skip("peft's checkpoint has the biases of the originals, and names layers of other adapters")
    model, want = trained(lib, method, bias)
    H.identical(lib.get_peft_model_state_dict(model), want)
    with model.disable_adapter():
        H.identical(lib.get_peft_model_state_dict(model), want)
    model.set_adapter("other")
    H.identical(lib.get_peft_model_state_dict(model), want)


@each_method
@each_bias
def test_a_model_loads_what_it_saved(method, bias, lib, is_ref, ref, tmp_path):
    x = torch.randn(4, 6)
    H.seed(0)
    theirs = H.move(ref.get_peft_model(net(), config(ref, method, bias, modules_to_save=["2"]))).eval()
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(lib.PeftModel.from_pretrained(net(), tmp_path).eval()(x), theirs(x))
    if not is_ref:
        model, saved = trained(lib, method, bias)
        again = lib.get_peft_model(net(), config(lib, method, bias, modules_to_save=["2"])).eval()
        lib.set_peft_model_state_dict(again, saved)
        torch.testing.assert_close(again(x), model(x))


@each_method
@each_bias
def test_injected_adapters_save_trained_biases(method, bias, lib, ref):
    H.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, theirs = (
            H.move(m.inject_adapter_in_model(config(m, method, bias), net())).eval() for m in (lib, ref)
        )
    state = lib.get_peft_model_state_dict(model)
    assert sorted(state) == sorted(ref.get_peft_model_state_dict(theirs))
    again = lib.inject_adapter_in_model(config(lib, method, bias), net()).eval()
    lib.set_peft_model_state_dict(again, state)
    x = torch.randn(4, 6)
    torch.testing.assert_close(again(x), model(x))
