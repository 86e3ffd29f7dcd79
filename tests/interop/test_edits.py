"""A model that has run sees its tensors as they are now, also where torch cannot know that they were changed."""

import numpy as np
import pytest
import torch

import minipeft

from . import harness as H
from .cases import CASES, each_case


def through_data(tensor):
    tensor.data.mul_(torch.linspace(0.5, 2.0, len(tensor)).view(-1, *[1] * (tensor.dim() - 1)).to(tensor))


def through_numpy(tensor):
    array = tensor.detach().numpy()
    array *= np.linspace(2.0, 0.5, len(array), dtype=array.dtype).reshape(-1, *[1] * (array.ndim - 1))


def with_new_data(tensor):
    tensor.data = tensor.data.flip(0).clone() * 1.5


EDITS = pytest.mark.parametrize("edit", [through_data, through_numpy, with_new_data], ids=lambda edit: edit.__name__)


def once(case):
    """One case of each method, and of DoRA on every kind of layer."""
    return not case.prompt and case.id.endswith("/plain") and ("/linear/" in case.id or case.method == "dora")


def weights(model):
    """Of the base model and of adapters; one that layers share stands here once."""
    return {id(p): p for p in model.parameters() if p.is_floating_point() and p.dim()}.values()


@EDITS
@each_case(once)
def test_edited_after_a_run(case, lib, edit):
    ran, fresh = (H.move(H.adapt(lib, case), case.scale) for _ in range(2))
    batch, before = H.inputs(case), None
    before = H.run(ran, batch)
    for model in (ran, fresh):
        for tensor in weights(model):
            edit(tensor)
    H.identical(H.run(ran, batch), H.run(fresh, batch))
    assert H.differ(H.run(ran, batch), before, 1e-4)


@EDITS
def test_experts_edited_after_a_run(lib, is_ref, edit):
    """Arrow keeps what it computed of its experts as long as their values are the same."""
    if is_ref:
        pytest.skip("peft keeps it for ever")
    case = next(c for c in CASES if c.id == "lora/linear/plain")

    def routed():
        model = H.adapt(lib, case)
        for name in ("one", "two"):
            H.add(lib, model, case, name, init_lora_weights=False)
        config = lib.LoraConfig(**{**case.kwargs, "arrow_config": lib.ArrowConfig(top_k=1)})
        model.add_adapter("router", config)
        model.set_adapter("router")
        return H.move(model.eval(), 0.5, only=lambda name, p: ".lora_" in name)

    ran, fresh = routed(), routed()
    batch = H.inputs(case)
    before = H.run(ran, batch)
    for model in (ran, fresh):
        for name, tensor in model.named_parameters():
            if ".lora_" in name:
                edit(tensor)
    H.identical(H.run(ran, batch), H.run(fresh, batch))
    assert H.differ(H.run(ran, batch), before, 1e-4)


@pytest.mark.parametrize("what", ["base_layer", "scaling", "lora_A"])
def test_what_is_assigned_on_a_layer_is_used(what):
    """As in peft: a base layer that something replaces or wraps, a dict of scales, a container of factors."""
    peft, outputs = pytest.importorskip("peft"), []
    for lib in (minipeft, peft):
        torch.manual_seed(0)
        config = lib.LoraConfig(target_modules=["0"], init_lora_weights=False)
        model = lib.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
        layer = model.base_model.model[0]
        before = model(x := torch.linspace(-1, 1, 24).view(4, 6))
        torch.manual_seed(1)
        factors = torch.nn.ModuleDict({"default": torch.nn.Linear(6, 8, bias=False)})
        new = {"base_layer": torch.nn.Linear(6, 5), "scaling": {"default": 5.0}, "lora_A": factors}[what]
        setattr(layer, what, new)
        outputs.append(model(x))
        assert (outputs[-1] - before).abs().max() > 0.1
        model.merge_adapter()
        assert torch.allclose(model(x), outputs[-1], atol=1e-5)
    assert torch.allclose(*outputs, atol=1e-6)


def test_a_merged_base_layer_is_not_replaced():
    net, config = torch.nn.Sequential(torch.nn.Linear(6, 5)), minipeft.LoraConfig(target_modules=["0"])
    model = minipeft.get_peft_model(net, config)
    model.merge_adapter()
    with pytest.raises(minipeft.MergeError, match="before it is replaced"):
        model.base_model.model[0].base_layer = torch.nn.Linear(6, 5)
