"""Adapted layers and trained copies may be called with their input by name, as the layer itself calls it."""

import warnings

import pytest
import torch
from torch import nn

from . import harness as H
from .cases import CASES, each_case

PLAIN = [c for c in CASES if not (c.prompt or c.base.transformers or c.inputs or "modules_to_save" in c.kwargs)]
EACH = {c.id for c in {c.method: c for c in PLAIN}.values()} | {c.id for c in {c.base.name: c for c in PLAIN}.values()}
KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)


def places(model):
    """What stands where the model's own layers stood."""
    return [m for n, m in model.named_modules() if hasattr(m, "base_layer") and not n.endswith(".base_layer")]


@each_case(lambda c: c.id in EACH)
def test_a_layer(case, lib, is_ref):
    if is_ref:
        pytest.skip("peft names the input of every layer x")
    model, batch = H.move(H.adapt(lib, case), case.scale), H.inputs(case)
    want, found = H.run(model, batch), 0
    for layer in places(model):
        if isinstance(layer.get_base_layer(), KINDS):
            layer.forward = (lambda call: lambda x, *args, **kwargs: call(*args, input=x, **kwargs))(layer.forward)
            found += 1
    if not found:
        pytest.skip("no layer of one input is adapted")
    H.identical(H.run(model, batch), want)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.by_name = True

    def forward(self, x):
        return self.head(input=self.fc(input=x)) if self.by_name else self.head(self.fc(x))


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["head"]}], ids=str)
def test_a_mixed_batch(fields, lib, is_ref):
    if is_ref:
        pytest.skip("peft names the input of every layer x")
    targets = ["fc", "head"] if not fields else ["fc"]
    model, x = Named(), torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in "ab":
            config = lib.LoraConfig(target_modules=targets, init_lora_weights=False, **fields)
            model = model.add_adapter(name, config) or model if name == "b" else lib.get_peft_model(model, config, name)
    H.move(model.eval(), only=lambda n, p: "modules_to_save" in n)
    mixed = model(x, adapter_names=["a", "b"])
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(x)[row])
    model.base_model.model.by_name = False
    torch.testing.assert_close(mixed[1], model(x)[1])


def test_no_input(lib, is_ref):
    if is_ref:
        pytest.skip("peft names the input of every layer x")
    layer = lib.get_peft_model(Named(), lib.LoraConfig(target_modules=["fc"])).base_model.model.fc
    with pytest.raises(TypeError, match="'input'"):
        layer(inputs=torch.randn(2, 6))
    with pytest.raises(TypeError, match="'input'"):
        layer()
