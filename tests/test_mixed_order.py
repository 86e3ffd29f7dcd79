"""Adapters of a PeftMixedModel act in the order in which they were added; a context without adapters restores all."""

import itertools

import pytest
import torch
from torch import nn

import minipeft

AT = {"target_modules": ["0", "2"]}
METHODS = {
    "lora": lambda: minipeft.LoraConfig(r=2, **AT),
    "loha": lambda: minipeft.LoHaConfig(r=2, **AT),
    "lokr": lambda: minipeft.LoKrConfig(r=2, **AT),
    "adalora": lambda: minipeft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, inference_mode=True, **AT),
    "oft": lambda: minipeft.OFTConfig(oft_block_size=3, **AT),
    "shira": lambda: minipeft.ShiraConfig(r=1, **AT),
}
KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), (5, 6)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 2)), (2, 3, 5, 6)),
}
CASES = [
    (kind, *pair)
    for kind, names in (("linear", METHODS), ("conv", ("lora", "loha", "lokr", "oft")))
    for pair in itertools.product(names, repeat=2)
]


def network(kind):
    torch.manual_seed(0)
    return KINDS[kind][0]().double().eval()


def batch(kind):
    return torch.randn(KINDS[kind][1], dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def fill(model, name, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if name in key.split("."):
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.5)


def one_after_the_other(kind, *configs):
    """The network with each adapter merged into what the one before has left."""
    model = network(kind)
    for seed, config in enumerate(configs):
        adapted = minipeft.get_peft_model(model, config, "it", autocast_adapter_dtype=False).double().eval()
        fill(adapted, "it", seed)
        model = adapted.merge_and_unload()
    return model


def mixed(kind, first, second, before=None):
    """A model with adapters "a" and "b", and with one of the method `before` that came first and is deleted again."""
    model = network(kind)
    if before is not None:
        model = minipeft.get_peft_model(model, METHODS[before](), "old", mixed=True)
        model.add_adapter("a", METHODS[first]())
    else:
        model = minipeft.get_peft_model(model, METHODS[first](), "a", mixed=True)
    model.add_adapter("b", METHODS[second]())
    model.double().eval()
    fill(model, "a", 0)
    fill(model, "b", 1)
    if before is not None:
        model.set_adapter(["a", "b"])
        model.delete_adapter("old")
    return model


@pytest.mark.parametrize("kind, first, second", CASES)
def test_order(kind, first, second):
    x = batch(kind)
    want = one_after_the_other(kind, METHODS[first](), METHODS[second]())(x)
    for before in (None, first, second):
        model = mixed(kind, first, second, before)
        for names in (["a", "b"], ["b", "a"]):
            model.set_adapter(names)
            torch.testing.assert_close(model(x), want)
            model.base_model.merge_adapter(names)
            torch.testing.assert_close(model(x), want)
            model.base_model.unmerge_adapter()
        torch.testing.assert_close(model.merge_and_unload(adapter_names=["b", "a"])(x), want)


def test_an_adapter_added_later_keeps_the_order():
    model = mixed("linear", "oft", "oft")
    model.set_adapter(["b", "a"])
    want = model(batch("linear"))
    model.add_adapter("c", METHODS["oft"]())
    torch.testing.assert_close(model(batch("linear")), want)
    model.delete_adapter("a")
    model.add_adapter("a", METHODS["oft"]())  # now it comes last
    fill(model.double(), "a", 0)
    model.set_adapter(["a", "b"])
    want = one_after_the_other("linear", METHODS["oft"](), METHODS["oft"]())(batch("linear"))
    assert not torch.allclose(model(batch("linear")), want)


@pytest.mark.parametrize("mixed_model", [False, True])
def test_without_adapters(mixed_model):
    x = batch("linear")
    model = minipeft.get_peft_model(network("linear"), METHODS["lora"](), mixed=mixed_model).double().eval()
    fill(model, "default", 0)
    base, want = network("linear")(x), model(x)
    flags = [p.requires_grad for p in model.parameters()]
    assert any(flags)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert torch.equal(model(x), base)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), want)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(model(x), want)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(x), base)
