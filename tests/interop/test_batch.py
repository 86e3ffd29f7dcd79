"""A mixed batch against its adapters one by one: gradients, batched products of LoRA, how often the layer runs."""

import pytest
import torch
from torch import nn

import minipeft
from minipeft.core.adapter import Activation, Transform
from minipeft.methods.lora.lora import LoRA

from . import harness as H
from .test_passes import mixed, two

FOUR = ["other", "default", "other", "other"]
GROUPS = {"even": [0, 1, 2, 3, 0, 1, 2, 3], "uneven": [0, 0, 0, 0, 0, 3, 2, 2], "bare": [2, None, 0, None, 0, 0, 0, 1],
          "sorted": [0, 0, 1, 1, 2, 2, 3, 3], "one": [1] * 8}


@pytest.fixture(autouse=True)
def _not_the_reference(is_ref):
    if is_ref:
        pytest.skip("peft neither trains mixed batches nor batches them")


def gradients(model, batches):
    """The sum over (batch, names, rows) of the gradients of a function of those rows of the output."""
    model.zero_grad()
    for batch, names, rows in batches:
        out = H.tensors(H.call(model, {**batch, "adapter_names": names}))
        sum((v[rows] * torch.sin(v[rows] + 1)).sum() for v in out.values() if v.dim() and len(v) == 4).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@mixed
def test_gradients(case, lib):
    """Of a mixed batch they are the sum of those of its samples, each with its adapter alone."""
    model = two(lib, case).double()
    batch = H.without_labels(H.inputs(case, torch.float64))
    got = gradients(model, [(batch, FOUR, [0, 1, 2, 3])])
    alone = [(batch, [name] * 4, [i for i in range(4) if FOUR[i] == name]) for name in ("default", "other")]
    H.close(got, gradients(model, alone), H.tolerance(case, torch.float64))


@mixed
def test_the_frozen_layer_runs_once(case, lib):
    """For a whole batch whose adapters leave the layer's input alone; otherwise at most once for each of them."""
    model, calls = two(lib, case), {}
    for layer in minipeft.core.layer.layers(model.get_base_model()):
        adapters = layer.adapters.values()
        if not any(isinstance(adapter, Transform) or type(adapter).pre is not Activation.pre
                   for adapter in adapters if isinstance(adapter, (Transform, Activation))):
            layer.base.leaf.register_forward_hook(lambda module, *_: calls.update({module: calls.get(module, 0) + 1}))
    H.run(model, {**H.without_labels(H.inputs(case)), "adapter_names": FOUR})
    assert all(n == 1 for n in calls.values())


def lora(ranks, dtype, **more):
    """A stack with one LoRA for each of `ranks`, moved."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)).to(dtype)
    for i, r in enumerate(ranks):
        config = minipeft.LoraConfig(r=r, lora_alpha=3 + i, target_modules=["0", "2"][: 1 + (i != 1)], **more)
        if i == 0:
            model = minipeft.get_peft_model(net, config, "0")
        else:
            model.add_adapter(str(i), config)
    return H.move(model.eval(), only=lambda name, p: "lora_" in name)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_products_of_lora(groups, shape, dtype, monkeypatch):
    """Ranks that differ, groups that differ, samples without an adapter: as by group, gradients included."""
    model = lora([2, 5, 3, 1], dtype)
    model.base_model.set_requires_grad(["0", "1", "2", "3"])
    names = ["__base__" if i is None else str(i) for i in GROUPS[groups]]
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()

    def run():
        model.zero_grad()
        x.grad = None
        y = model(x, adapter_names=names)
        (y * torch.sin(y + 1)).sum().backward()
        return y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None and p.grad.any())

    got = run()
    seen = []
    monkeypatch.setattr(LoRA, "low_rank", lambda self: seen.append(self))
    want = run()
    assert seen and len(got) == len(want)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, **({"rtol": 0.03, "atol": 0.03} if dtype is torch.bfloat16 else {}))


def test_products_that_are_not_only_that(monkeypatch):
    """A bias of B, a hook on a factor, dropout while training: those run by group, and have their effect."""
    model = lora([2, 3], torch.float64, lora_bias=True, lora_dropout=0.5)
    x, names = torch.randn(4, 12, dtype=torch.float64), ["0", "1", "0", "1"]
    layer = model.base_model.model[0]
    assert all(adapter.low_rank() is None for adapter in layer.adapters.values())
    model = lora([2, 3], torch.float64, lora_dropout=0.5)
    layer = model.base_model.model[0]
    before = model(x, adapter_names=names)
    handle = layer.lora_A["0"].register_forward_hook(lambda module, args, output: 2 * output)
    hooked = model(x, adapter_names=names)
    assert torch.equal(hooked[1::2], before[1::2]) and not torch.allclose(hooked[::2], before[::2])
    handle.remove()
    layer.train()
    assert all(adapter.low_rank() is None for adapter in layer.adapters.values())


def test_scales_set_as_tensors():
    """As hot swapping into a compiled model has them."""
    model = lora([2, 3], torch.float64)
    x, names = torch.randn(4, 12, dtype=torch.float64), ["0", "1", "0", "1"]
    want = model(x, adapter_names=names)
    for layer in minipeft.core.layer.layers(model):
        for name, scale in layer.scaling.items():
            layer.scaling[name] = torch.tensor(scale)
    torch.testing.assert_close(model(x, adapter_names=names), want)
