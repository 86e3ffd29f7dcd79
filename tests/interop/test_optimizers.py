"""LoRA+, LoRA-FA and Riemannian preconditioning: the same steps as in peft."""

import importlib

import pytest
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a, self.norm, self.b = (
            nn.Embedding(11, 6),
            nn.Linear(6, 10),
            nn.LayerNorm(10),
            nn.Linear(10, 6),
        )

    def forward(self, ids):
        return self.b(self.norm(torch.tanh(self.a(self.words(ids)))))


def adapted(lib, targets=("words", "a", "b"), dtype=torch.float64, **fields):
    torch.manual_seed(0)
    model = Net().to(dtype)
    torch.manual_seed(1)
    fields = {"modules_to_save": ["norm"], "rank_pattern": {"b": 5}, "lora_alpha": 3, "r": 4, **fields}
    return lib.get_peft_model(model, lib.LoraConfig(target_modules=list(targets), **fields))


def run(lib, make, steps=4, **options):
    model = adapted(lib, **options)
    optimizer = make(importlib.import_module(f"{lib.__name__}.optimizers"), model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1, 3)
    ids = torch.arange(22).view(2, 11) % 11
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids).sub(1).pow(2).mean().backward()
        optimizer.step()
        schedule.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(lib, ref, make, **options):
    start = {name: p.detach().clone() for name, p in adapted(lib, **options).named_parameters()}
    ours, theirs = run(lib, make, **options), run(ref, make, **options)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    return {name for name in start if not torch.equal(start[name], ours[name])}


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"bias": "all"}, {"lora_bias": True, "targets": ("a",)}])
@pytest.mark.parametrize("extra", [{}, {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 0.05}])
def test_loraplus(fields, extra, lib, ref):
    if fields.get("lora_bias"):
        fields = {**fields, "rank_pattern": {}}

    def make(optimizers, model):
        cls = torch.optim.AdamW
        return optimizers.create_loraplus_optimizer(model, cls, lr=1e-2, loraplus_lr_ratio=8.0, eps=1e-7, **extra)

    moved = same(lib, ref, make, **fields)
    assert any("lora_A" in name for name in moved) and any("lora_B" in name for name in moved)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"init_lora_weights": False}])
def test_lorafa(fields, lib, ref, monkeypatch):
    """peft multiplies in bfloat16 where the machine has it, also for float64 weights; that is switched off here."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    rank = {**fields, "rank_pattern": {}}
    moved = same(lib, ref, lambda o, m: o.create_lorafa_optimizer(m, 4, 3, 1e-2, weight_decay=0.1), **rank)
    assert any("lora_B" in name for name in moved) and any("norm" in name for name in moved)
    assert not any("_A" in name for name in moved)


def test_lorafa_beside_other_parameters(lib, is_ref):
    """With DoRA and biases too each B goes with its own A. (peft pairs parameters in the order in which they stand.)"""
    if is_ref:
        pytest.skip("peft pairs a magnitude vector with the next layer's A")

    def make(optimizers, model):
        optimizer = optimizers.create_lorafa_optimizer(model, 4, 3, 1e-2)
        assert all(A.shape[0] == B.shape[1] and not A.requires_grad for B, (A, _) in optimizer.pairs.items())
        assert len(optimizer.pairs) == 3
        return optimizer

    moved = run(lib, make, use_dora=True)
    start = dict(adapted(lib, use_dora=True).named_parameters())
    moved = {name for name in start if not torch.equal(start[name], moved[name])}
    assert sum("magnitude" in name for name in moved) == 3 and sum("lora_B" in name for name in moved) == 2


def test_lorafa_state_goes_on(lib, is_ref):
    """Saving and loading the optimizer's state in the middle changes nothing."""
    make = importlib.import_module(f"{lib.__name__}.optimizers").create_lorafa_optimizer
    ids, ends = torch.arange(22).view(2, 11) % 11, []
    for broken in (False, True):
        model = adapted(lib, rank_pattern={})
        optimizer = make(model, 4, 3, 1e-2)
        for step in range(4):
            if broken and step == 2:
                state, optimizer = optimizer.state_dict(), make(model, 4, 3, 1e-2)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(ids).sub(1).pow(2).mean().backward()
            optimizer.step()
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True, "init_lora_weights": False}])
def test_riemannian(cls, fields, lib, ref):
    moved = same(lib, ref, lambda o, m: o.create_riemannian_optimizer(m, cls, lr=1e-2, reg=0.03), **fields)
    assert any("lora_A" in name for name in moved) and any("norm" in name for name in moved)


def test_refused(lib):
    optimizers = importlib.import_module(f"{lib.__name__}.optimizers")
    model = adapted(lib)
    with pytest.raises(ValueError):
        optimizers.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1.0)
    with pytest.raises(TypeError):
        optimizers.create_riemannian_optimizer(model, dict, lr=1.0)
    with pytest.raises(ValueError):
        optimizers.create_riemannian_optimizer(Net(), torch.optim.SGD, lr=1.0)
    with pytest.raises(ValueError):
        optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0).step(lambda: 0)
    with pytest.raises(ValueError):
        optimizers.create_lorafa_optimizer(model, 4, 3, 1e-2, use_rslora=True)
    with pytest.raises(ValueError):
        optimizers.LoraFAOptimizer([torch.ones(1)], lr=-1.0)
