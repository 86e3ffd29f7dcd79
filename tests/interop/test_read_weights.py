"""Models that take a layer's weight instead of calling the layer: adapters act there all the same.

timm's BEiT, EVA and Swin 2, torchvision's Swin and transformers' WavLM do. (peft 0.21.2 passes them over, silently.)
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minipeft
from minipeft.core import api
from minipeft.core.reads import is_read

from . import harness as H
from .test_core import FIRST


class Reads(nn.Module):
    """Every kind of layer, called or read."""

    def __init__(self, read):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.read = read
        self.emb, self.lin, self.norm = nn.Embedding(20, 12), nn.Linear(12, 12), nn.LayerNorm(12)
        self.conv, self.conv1d = nn.Conv1d(12, 12, 3, padding=1), Conv1D(12, 12)

    def forward(self, x):
        return torch.tanh(self.by_reading(x) if self.read else self.by_calling(x)) @ self.emb.weight.t()

    def by_calling(self, x):
        x = self.norm(self.lin(self.emb(x)))
        return self.conv1d(self.conv(x.mT).mT.contiguous())

    def by_reading(self, x):
        x = F.linear(F.embedding(x, self.emb.weight), self.lin.weight, self.lin.bias)
        x = F.layer_norm(x, (12,), weight=self.norm.weight, bias=self.norm.bias)
        x = F.conv1d(x.mT, self.conv.weight, self.conv.bias, padding=1).mT
        return torch.matmul(x, self.conv1d.weight) + self.conv1d.bias


def adapt(config, read, name="default"):
    torch.manual_seed(0)
    model = api.inject_adapter_in_model(config, Reads(read).double(), name)
    return H.move(model, 0.3, only=lambda key, p: p.requires_grad).eval()


IDS = torch.arange(10).view(2, 5)


def outcome(model, told):
    with api.mixed_batch(model, None, **told):
        out = model(IDS)
    out.sin().sum().backward()
    return {"out": out} | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer", ["lin", "conv", "conv1d", "emb", "norm"])
@pytest.mark.parametrize("method", [*FIRST])
def test_what_is_read_is_what_a_call_does(method, layer):
    case = FIRST[method]
    if (method == "ln_tuning") is not (layer == "norm") or (method == "trainable_tokens" and layer != "emb"):
        pytest.skip("not a layer for the method")
    fields = {**copy.deepcopy(case.kwargs), "target_modules": [layer]}
    if "feedforward_modules" in fields:
        fields["feedforward_modules"] = []
    config = getattr(minipeft, case.config)(**fields)
    told = {key: value[:2] for key, value in H.inputs(case).items() if key in case.inputs}
    try:
        called = adapt(copy.deepcopy(config), False)
    except minipeft.UnsupportedLayerError:
        pytest.skip("not a layer for the method")
    read = adapt(config, True)
    if not case.merges:
        with pytest.raises(minipeft.MergeError):
            outcome(read, told)
        return
    H.close(outcome(read, told), outcome(called, told), 1e-6)
    with torch.no_grad():
        running = read(IDS)
        api.merge(read)
        torch.testing.assert_close(read(IDS), running, rtol=0, atol=1e-5)
        api.unmerge(read)
        torch.testing.assert_close(read(IDS), running, rtol=0, atol=0)
        with api.disable_adapter(read):
            base = read(IDS)
        assert (running - base).abs().max() > 1e-4


def test_a_mixed_batch_is_refused():
    model = adapt(minipeft.LoraConfig(target_modules=["lin"]), True)
    with pytest.raises(minipeft.BatchError, match=r"'lin'.*is read"), api.mixed_batch(model, ["default", "__base__"]):
        model(IDS)


def test_copies_and_unloading():
    model = adapt(minipeft.LoraConfig(target_modules=["lin", "conv"]), True)
    want = model(IDS)
    torch.testing.assert_close(copy.deepcopy(model)(IDS), want)
    torch.testing.assert_close(api.merge_and_unload(copy.deepcopy(model))(IDS), want, rtol=0, atol=1e-12)


class Above(nn.Module):
    """What reads, in all ways, and what only asks."""

    def __init__(self):
        super().__init__()
        self.rows = nn.ModuleList([nn.ModuleDict({"loop": nn.Linear(2, 2), "other": nn.Linear(2, 2)})])
        self.deep = nn.ModuleDict({"read": nn.Linear(2, 2), "asked": nn.Linear(2, 2)})
        self.method, self.inner, self.unused = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.dtype, self.shape, self.kind = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.written = nn.Linear(2, 2)

    def forward(self, x):
        if isinstance(self.kind.weight, nn.Parameter) and getattr(self.kind.weight, "bits", None):
            return None
        for row in self.rows:
            x = row.loop.weight @ x.to(self.dtype.weight.dtype)
        x = x + self.helped(x) + sum(y @ self.inner.weight for y in x)
        self.written.weight.data.clamp_(-1, 1)
        self.dtype.weight.requires_grad_(True)
        return x @ self.deep.read.weight + self.shape.weight.shape[0] + self.deep.asked.weight.size(0)

    def helped(self, x):
        return self.method.weight * x

    def never(self, x):
        return self.unused.weight * x


@pytest.mark.parametrize("hooked", [False, True])
def test_how_it_is_told(hooked):
    model = Above()
    if hooked:  # as accelerate does it
        model.forward = functools.update_wrapper(functools.partial(lambda m, x: m, model), model.forward)
    outer = nn.Sequential(model)
    found = {path for path, m in outer.named_modules() if isinstance(m, nn.Linear) and is_read(outer, path)}
    assert found == {"0.rows.0.loop", "0.deep.read", "0.method", "0.inner"}


def test_wavlm():
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(0)
    small = {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [4], "num_feat_extract_layers": 1}
    base = WavLMModel(
        WavLMConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=4, **small,
        )
    )  # fmt: skip
    config = minipeft.LoraConfig(target_modules=["q_proj", "v_proj", "out_proj"], init_lora_weights=False)
    model, x = minipeft.get_peft_model(base, config).eval(), torch.randn(1, 64)
    running = model(x).last_hidden_state
    running.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    torch.testing.assert_close(model.merge_and_unload()(x).last_hidden_state, running, rtol=1e-4, atol=1e-4)
