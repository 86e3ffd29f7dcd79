"""Layers whose class has a `forward` of its own: merging does what running does, or is refused and changes nothing.

timm's standardised convolutions and OPT's positions are such. (peft 0.21.2 merges, into other numbers.)
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minipeft
from minipeft.core import api

from . import harness as H
from .test_core import FIRST


class Normed(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Upcast(nn.Linear):
    def forward(self, x):
        return F.linear(x.double(), self.weight.double(), self.bias.double()).to(x.dtype)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias)


class Padded(nn.Conv2d):
    """As timm's Conv2dSame; its constructor does not take all arguments of torch's."""

    def __init__(self, inp, out, kernel, stride=1, padding=0, dilation=1, groups=1, bias=True):
        super().__init__(inp, out, kernel, stride, 0, dilation, groups, bias)

    def forward(self, x):
        return super().forward(F.pad(x, [k // 2 for k in self.kernel_size for _ in range(2)]))


class Later(nn.Embedding):
    def forward(self, x):
        return super().forward(x + 2)


VECTORS, IDS = torch.linspace(-9, 9, 48).view(4, 12).sin(), torch.arange(8)
IMAGES = torch.linspace(-9, 9, 768).view(1, 12, 8, 8).sin()
LORA = minipeft.LoraConfig(target_modules=["0"], init_lora_weights=False)
KINDS = {
    "normed": (lambda: Normed(12, 12), VECTORS),
    "upcast": (lambda: Upcast(12, 12), VECTORS),
    "standardised": (lambda: Standardised(12, 12, 3, padding=1), IMAGES),
    "later": (lambda: Later(20, 12), IDS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FIRST)
def test_merging_does_what_running_does_or_nothing(method, kind):
    case, (make, x) = FIRST[method], KINDS[kind]
    fields = {**copy.deepcopy(case.kwargs), "target_modules": ["0"]}
    if "feedforward_modules" in fields:
        fields["feedforward_modules"] = ["0"]
    torch.manual_seed(0)
    try:
        model = api.inject_adapter_in_model(getattr(minipeft, case.config)(**fields), nn.Sequential(make()))
    except (minipeft.UnsupportedLayerError, minipeft.ConfigError):
        pytest.skip("not a layer for the method")
    if not case.merges:
        pytest.skip("no merge")
    model, run = H.move(model, 0.3, only=lambda key, p: p.requires_grad).eval(), torch.no_grad()(lambda m: m(x))
    running, weights = run(model), H.snapshot(model)
    for merge in api.merge, lambda m: api.merge_and_unload(copy.deepcopy(m)):
        try:
            merged = merge(model) or model
        except minipeft.MergeError as error:
            assert kind != "upcast" and "'0', a" in str(error)
            H.identical(H.snapshot(model), weights)
        else:
            torch.testing.assert_close(run(merged), running, rtol=1e-3, atol=1e-3)
            if merged is model:
                api.unmerge(model)
    H.identical(H.snapshot(model), weights)
    torch.testing.assert_close(run(model), running, rtol=0, atol=0)


@pytest.mark.parametrize("layer", ["normed", "standardised", "later"])
def test_lora_is_refused(layer):
    model = minipeft.get_peft_model(nn.Sequential(KINDS[layer][0]()), LORA)
    for merge in model.merge_adapter, model.merge_and_unload:
        with pytest.raises(minipeft.MergeError, match="does something else with its weight"):
            merge()


def test_factors_of_a_convolution_with_a_constructor_of_its_own():
    model = minipeft.get_peft_model(nn.Sequential(Padded(12, 6, 3, stride=2)), LORA).eval()
    running = model(IMAGES)
    torch.testing.assert_close(model.merge_and_unload()(IMAGES), running, rtol=1e-4, atol=1e-5)
