"""Gated LoRA in a model: trained, saved, loaded, merged, and in one batch with others."""

import pytest
import torch
from gated_lora import GatedLora, GatedLoraConfig

import minipeft


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))


def config(**more):
    return GatedLoraConfig(**{"r": 2, "target_modules": ["0", "2"], **more})


@pytest.fixture
def trained():
    """A model with an adapter that two steps have moved."""
    model = minipeft.get_peft_model(network(), config())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    x = torch.randn(16, 8)
    for _ in range(2):
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_new_adapter_changes_nothing_and_has_as_many_parameters_as_it_says():
    model, x = minipeft.get_peft_model(network(), config()), torch.randn(4, 8)
    assert torch.equal(model(x), network()(x))
    assert model.get_nb_trainable_parameters()[0] == 2 * (8 + 12) + 12 + 2 * (12 + 3) + 3


def test_saved_and_loaded(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    again, x = minipeft.PeftModel.from_pretrained(network(), tmp_path), torch.randn(4, 8)
    assert torch.equal(again(x), trained(x)) and not torch.equal(again(x), network()(x))
    assert isinstance(again.peft_config["default"], GatedLoraConfig)
    assert {type(a) for m in again.modules() for a in getattr(m, "adapters", {}).values()} == {GatedLora}


def test_merging_is_running(trained):
    x = torch.randn(4, 8)
    y = trained(x)
    assert torch.allclose(trained.merge_and_unload()(x), y, atol=1e-6)


def test_one_batch_for_several(trained):
    trained.add_adapter("other", config(r=1, alpha=3.0))
    x = torch.randn(3, 8)
    y = trained(x, adapter_names=["default", "__base__", "other"])
    assert torch.allclose(y[0], trained(x)[0], atol=1e-6)
    assert torch.allclose(y[1:], network()(x)[1:], atol=1e-6)  # "other" is new


def test_beside_lora_on_one_model():
    lora = minipeft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = minipeft.get_peft_model(network(), config(), mixed=True)
    model.add_adapter("lora", lora)
    model.set_adapter(["default", "lora"])
    x = torch.randn(4, 8)
    y = model(x)
    assert torch.allclose(model.merge_and_unload()(x), y, atol=1e-6)
