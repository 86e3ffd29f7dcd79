"""What is made or loaded under torch.inference_mode() is like any other, and can be trained afterwards."""

import pytest
import torch

from . import harness as H
from .cases import each_case

WAYS = {"modules_to_save", "trainable_token_indices", "use_dora", "arrow_config", "alora_invocation_tokens"}


def one_of_each():
    """The first case of each method, alone and with each of what can be trained beside it."""
    seen = set()

    def new(case):
        key = case.config, *sorted(WAYS & case.kwargs.keys())
        return not (key in seen or seen.add(key))

    return new


each = each_case(one_of_each())


def trained(model, case):
    """The model after one step of SGD in train mode: its tensors, and the gradients that made it."""
    H.move(model, case.scale).train()
    torch.manual_seed(0)
    grads = H.gradients(model, H.inputs(case))
    return {k: g for k, g in grads.items() if not k.startswith("input:")}


@each
def test_made(case, lib):
    made, base = H.adapt(lib, case), case.base.build()
    with torch.inference_mode():
        inside = H.adapt(lib, case, base)
    assert not any(t.is_inference() for t in (*inside.parameters(), *inside.buffers()))
    H.identical(H.snapshot(inside), H.snapshot(made))
    H.identical(trained(inside, case), trained(made, case))


@each
def test_loaded(case, lib, tmp_path):
    made = H.move(H.adapt(lib, case), case.scale)
    made.save_pretrained(tmp_path)
    load = lambda base: lib.PeftModel.from_pretrained(base, tmp_path, is_trainable=not case.prompt)
    outside, base = load(case.base.build()), case.base.build()
    with torch.inference_mode():
        inside = load(base)
        inside.load_adapter(tmp_path, "default")
        if case.second is not None:
            inside.load_adapter(tmp_path, "again")
    assert not any(t.is_inference() for t in (*inside.parameters(), *inside.buffers()))
    if case.second is not None:
        inside.delete_adapter("again")
    H.identical(H.snapshot(inside), H.snapshot(outside))


def test_hot_swapped(lib, tmp_path):
    """Also with a larger rank, which takes new memory."""
    from importlib import import_module

    hotswap_adapter = import_module(
        f"{lib.__name__}.utils.hotswap" if lib.__name__ == "peft" else "minipeft.compat.hotswap"
    )
    layer = lambda: torch.nn.Sequential(torch.nn.Linear(8, 6))
    model = lib.get_peft_model(layer(), lib.LoraConfig(r=2, target_modules=["0"]))
    H.move(lib.get_peft_model(layer(), lib.LoraConfig(r=4, target_modules=["0"]))).save_pretrained(tmp_path)
    with torch.inference_mode():
        hotswap_adapter.hotswap_adapter(model, tmp_path, "default")
    model.train()(torch.randn(3, 8)).sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_switched_off_there(lib):
    """Trained biases are put aside and back, in whatever dtype the model has by then."""
    config = lib.LoraConfig(target_modules=["0"], bias="all")
    model = lib.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
    model.double()
    with torch.inference_mode(), model.disable_adapter():
        model(torch.randn(3, 8, dtype=torch.float64))
    assert not any(p.is_inference() for p in model.parameters())
    with model.disable_adapter():
        assert not any(p.is_inference() for p in model.parameters())


def test_base_model_made_there(lib, is_ref):
    """torch computes no gradients through it: that is said at once. It can be run."""
    if is_ref:
        pytest.skip("peft says nothing")
    with torch.inference_mode():
        base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    with pytest.warns(lib.PeftWarning, match="inference_mode"):
        model = lib.get_peft_model(base, lib.LoraConfig(target_modules=["0"]))
    with torch.inference_mode():
        assert model(torch.randn(3, 8)).shape == (3, 6)
