"""An adapter that runs as W + dW, one product instead of two, gives what it gives beside the frozen layer."""

import pytest
import torch

import minipeft
from minipeft.core.adapter import Delta
from minipeft.methods.lora.lora import Factors

from . import harness as H
from .test_passes import once_each


@pytest.fixture(autouse=True)
def _not_the_reference(is_ref):
    if is_ref:
        pytest.skip("about minipeft's core")


def adapters(model):
    return [a for layer in minipeft.core.layer.layers(model) for a in layer.adapters.values()]


@once_each(lambda case: "/linear/" in case.id and not case.prompt)
@pytest.mark.parametrize("training", [False, True])
def test_one_product_is_two(case, training, lib, monkeypatch):
    """Outputs and gradients, the layer's input included; random draws while training fall alike."""
    model = H.move(H.adapt(lib, case), case.scale, only=H.adapter_or_trainable).double().train(training)
    if not any(isinstance(a, Delta) and not isinstance(a, Factors) and a.by_weight for a in adapters(model)):
        pytest.skip("goes beside the layer anyway")
    batch = H.inputs(case, torch.float64)
    seen = []
    kind = minipeft.core.bases.Linear
    is_plain = kind.is_plain
    monkeypatch.setattr(kind, "is_plain", lambda self, x: seen.append(is_plain(self, x)) or seen[-1])
    H.seed(0)
    got = H.gradients(model, batch)
    assert any(seen)
    monkeypatch.setattr(kind, "is_plain", lambda self, x: False)
    H.seed(0)
    H.close(got, H.gradients(model, batch), H.tolerance(case, torch.float64))


@pytest.mark.parametrize("how", ["plain", "hook", "backward hook", "forward", "bfloat16", "autocast", "subclass"])
def test_only_of_a_layer_that_is_no_more_than_its_weight(how):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = torch.nn.Sequential((Doubled if how == "subclass" else torch.nn.Linear)(6, 6))
    model = minipeft.get_peft_model(net, minipeft.LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    leaf = layer.base_layer
    if how == "hook":
        leaf.register_forward_hook(lambda module, args, y: y + 1)
    elif how == "backward hook":
        leaf.register_full_backward_hook(lambda module, *grads: None)
    elif how == "forward":
        leaf.forward = lambda x: torch.nn.functional.linear(x, leaf.weight) * 3
    elif how == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        assert layer.base.is_plain(x) is (how == "plain")
        want = leaf(x) + layer.adapters["default"].branch(x)
        torch.testing.assert_close(layer(x), want.to(layer(x).dtype), rtol=0.02, atol=0.02)
