"""SHiRA with a mask function of one's own, which no configuration file can hold."""

import pytest
import torch
from torch import nn

import minipeft
from minipeft.core.errors import ConfigError, PeftWarning


def largest(layer, r, **kwargs):
    """A mask of the largest weights."""
    n = r * sum(layer.weight.shape)
    mask = torch.zeros(layer.weight.numel())
    mask[layer.weight.detach().abs().flatten().topk(n)[1]] = 1
    return mask.view_as(layer.weight)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def config(**fields):
    with pytest.warns(PeftWarning, match="mask_fn"):
        return minipeft.ShiraConfig(r=1, target_modules=["0", "2"], mask_type="largest", **fields)


def test_the_function_chooses_the_entries(tmp_path):
    c = config(init_weights=False)
    c.mask_fn = largest
    net = minipeft.get_peft_model(model(), c)
    x = torch.randn(3, 6)
    y = net(x)
    for path in ("0", "2"):
        layer = net.base_model.model.get_submodule(path)
        mask = largest(layer.base_layer, 1).bool()
        delta = layer.get_delta_weight("default")
        assert ((delta != 0) == mask).all()
    net.save_pretrained(str(tmp_path))
    loaded = minipeft.PeftModel.from_pretrained(model(), str(tmp_path))  # the places are in the checkpoint
    assert torch.equal(loaded(x), y)


def test_without_a_function():
    with pytest.raises(ConfigError, match="mask_fn"):
        minipeft.get_peft_model(model(), config())


@pytest.mark.parametrize("mask", [torch.ones(8, 6), torch.zeros(8, 6), torch.ones(6, 8)])
def test_a_mask_that_does_not_fit(mask):
    c = config()
    c.mask_fn = lambda layer, r, **kwargs: mask
    with pytest.raises(ConfigError, match="14 ones"):
        minipeft.get_peft_model(model(), c)
