"""nn.TransformerEncoderLayer in eval mode calls nothing inside it: it reads the weights, if those are plain tensors.

Adapters on its layers act all the same. (peft 0.21.2 passes them over there, without a word.)
"""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

import minipeft
from minipeft.core import api

from . import harness as H
from .test_core import FIRST

METHODS = {name: case for name, case in FIRST.items() if name != "trainable_tokens"}  # that is for embeddings
PADDED = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()  # the encoder makes nested tensors of it


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2).double().eval()


def adapt(config, model=None, name="default"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = api.inject_adapter_in_model(config, encoder() if model is None else model, name)
    return H.move(model, 0.3, only=lambda key, p: p.requires_grad and f".{name}" in key).eval()


def run(model, names=None, told=None, fused=True, **inputs):
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with torch.no_grad(), api.mixed_batch(model, names, **told or {}):
            return model(x, **inputs)[~inputs.get("src_key_padding_mask", torch.zeros(2, 5).bool())]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def assert_acts(model, **inputs):
    got, want = run(model, **inputs), run(model, fused=False, **inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    with api.disable_adapter(model):
        base = run(model, **inputs)
    assert (want - base).abs().max() > 1e-4
    return want


@pytest.mark.parametrize("mask", [{}, {"src_key_padding_mask": PADDED}], ids=["", "padded"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_act(method, mask):
    case = METHODS[method]
    targets = ["norm1", "norm2"] if method == "ln_tuning" else ["linear1", "linear2"]
    fields = {**copy.deepcopy(case.kwargs), "target_modules": targets}
    if "feedforward_modules" in fields:
        fields["feedforward_modules"] = ["linear2"]
    model = adapt(getattr(minipeft, case.config)(**fields))
    told = {key: value[:2] for key, value in H.inputs(case).items() if key in case.inputs}
    if method == "alora":  # invoked from the first token on
        told = {"input_ids": torch.tensor([[*case.kwargs["alora_invocation_tokens"]] * 5] * 2)[:, :5]}
    want = assert_acts(model, told=told, **mask)
    if case.merges:
        api.merge(model)
        torch.testing.assert_close(run(model, told=told, **mask), want, rtol=0, atol=1e-6)
        api.unmerge(model)
        assert_acts(model, told=told, **mask)


@pytest.mark.parametrize("target", ["linear1", "linear2", "self_attn", "out_proj"])
def test_on_the_last_layer_alone(target):
    """The encoder itself looks at its first layer only."""
    for mask in {}, {"src_key_padding_mask": PADDED}:
        assert_acts(adapt(minipeft.LoraConfig(target_modules=rf"layers\.1\..*{target}")), **mask)


def test_mixed_batches():
    """Also of adapters none of which is active here."""
    model = adapt(minipeft.LoraConfig(target_modules=["linear2"]))
    adapt(minipeft.LoraConfig(target_modules=["linear1"]), model, "other")
    api.set_adapter(model, "default")
    got = run(model, ["default", "other"]).view(2, 5, 12)
    for row, name in enumerate(["default", "other"]):
        api.set_adapter(model, name)
        torch.testing.assert_close(got[row], run(model, fused=False).view(2, 5, 12)[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("active", ["default", "other"])
def test_a_mixed_batch_through_a_weight_that_is_read_is_refused(active):
    model = adapt(minipeft.LoraConfig(target_modules=["linear2"]))
    adapt(minipeft.LoraConfig(target_modules=["out_proj"]), model, "other")
    api.set_adapter(model, active)
    with pytest.raises(minipeft.PeftError, match=r"out_proj.*is read"):
        run(model, ["default", "other"])
    run(model, ["default", "__base__"])  # nothing of it acts there


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_with_gradients_and_without(grad):
    """Trained modules beside it, which the layer reads too."""
    config = minipeft.LoraConfig(target_modules=["linear1"], modules_to_save=["norm1", "linear2"])
    model = H.move(minipeft.get_peft_model(encoder(), config), 0.3).eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    with grad():
        got = model(x)
    want = model.train().requires_grad_(False)
    for module in want.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    torch.testing.assert_close(got, want(x), rtol=0, atol=1e-12)


def test_compiled():
    model = adapt(minipeft.LoraConfig(target_modules=["linear1", "linear2"]))
    want = run(model)
    torch.testing.assert_close(run(torch.compile(model, backend="eager", fullgraph=True)), want, rtol=0, atol=1e-12)
