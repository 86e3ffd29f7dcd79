"""LoRA-GA: peft's gradients, factors and base weights, for the same training steps at the same seed."""

import itertools

import pytest
import torch
from torch import nn

from . import harness as H

DIRECTIONS = ["ArBr", "A2rBr", "ArB2r", "random"]
SCALES = ["stable", "weight_svd", "gd_scale", "unit"]
TARGETS = ["one", "two", "inner.three"]


class Net(nn.Module):
    def __init__(self, conv1d=True):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.head = nn.Linear(12, 20), nn.Linear(16, 4)
        if conv1d:
            from transformers.pytorch_utils import Conv1D

            self.two = Conv1D(24, 20)
        else:
            self.two = nn.Linear(20, 24)
        self.inner = nn.ModuleDict({"three": nn.Linear(24, 16, bias=False)})
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.head(self.drop(self.inner["three"](torch.tanh(self.two(torch.tanh(self.one(x)))))))


def config(lib, direction="ArB2r", scale="stable", targets=TARGETS, **fields):
    ga = lib.LoraGAConfig(direction=direction, scale=scale, stable_gamma=8)
    fields = {"r": 3, "lora_alpha": 5, **fields}
    return lib.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=ga, target_modules=list(targets), **fields)


def steps(model, count=3):
    """Forward and backward on some batches."""

    def run():
        g = torch.Generator().manual_seed(2)
        for _ in range(count):
            x = torch.randn(30, 12, generator=g).to(next(model.parameters()).dtype)
            model(x).sin().sum().backward()

    return run


def adapted(lib, net=None, dtype=torch.float32, cache=None, count=3, **fields):
    net = (Net() if net is None else net).to(dtype)
    given = config(lib, **fields)
    lib.preprocess_loraga(net, given, steps(net, count), cache_file=cache)
    H.seed(4)
    return lib.get_peft_model(net, given).eval()


@pytest.fixture(autouse=True)
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: one of the layers is its")


@pytest.mark.parametrize("direction, scale", itertools.product(DIRECTIONS, SCALES))
def test_same_start(direction, scale, lib, ref):
    theirs, ours = (adapted(module, direction=direction, scale=scale) for module in (ref, lib))
    H.close(H.snapshot(ours), H.snapshot(theirs), 1e-4)
    assert H.differ(ours.base_model.model.one.base_layer.state_dict(), Net().one.state_dict(), 1e-4)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), Net()(x), rtol=1e-3, atol=1e-4)  # s B A stands beside W - s B A


VARIANTS = [
    {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"two": 2}}, {"dtype": torch.bfloat16},
    {"targets": ["inner.three"]}, {"count": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_same_start_of_variants(fields, lib, ref):
    theirs, ours = (adapted(module, **fields) for module in (ref, lib))
    H.close(H.snapshot(ours), H.snapshot(theirs), 4e-2 if "dtype" in fields else 1e-4)


def test_model_is_left_as_it_was(lib):
    net = Net().eval()
    net.two.weight.requires_grad = False
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = [(n, p.requires_grad, p.grad) for n, p in net.named_parameters()], H.snapshot(net)
    lib.preprocess_loraga(net, config(lib), steps(net))
    assert [(n, p.requires_grad) for n, p in net.named_parameters()] == [(n, on) for n, on, _ in before[0]]
    assert [p.grad for p in net.parameters()][:2] == [None, None] and net.head.weight.grad.eq(1).all()
    H.identical(H.snapshot(net), before[1])
    assert not net.training and not any(m._backward_hooks for m in net.modules())
    model = lib.get_peft_model(net, config(lib))
    assert not any("_peft_loraga_grad" in vars(m) for m in model.modules())


def test_cache(lib, ref, tmp_path):
    cache = tmp_path / "deeper" / "gradients.pt"
    first = adapted(lib, cache=str(cache))
    for module in (lib, ref):
        net, given = Net(), config(module)
        module.preprocess_loraga(net, given, lambda: pytest.fail("the cache was not used"), cache_file=str(cache))
        H.seed(4)
        H.close(H.snapshot(module.get_peft_model(net, given)), H.snapshot(first), 1e-4)
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises((ValueError, KeyError)):
        lib.preprocess_loraga(net, config(lib, targets=["0"]), lambda: None, cache_file=str(cache))


def test_made_plain(lib, ref, tmp_path):
    """Trained, and saved as a plain LoRA of twice the rank for the base model as it was."""
    model = adapted(lib)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "lora_ga"
    H.move(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    x = torch.randn(5, 12)
    for module in (lib, ref):
        again = module.PeftModel.from_pretrained(Net(), tmp_path / "plain").eval()
        torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-4)


def test_without_gradient(lib, ref):
    for module in (lib, ref):
        model = module.get_peft_model(Net(), config(module))
        assert not model.base_model.model.one.lora_B["default"].weight.any()
        assert not H.differ(model.base_model.model.one.base_layer.state_dict(), Net().one.state_dict(), 1e-9)


def test_refusals(lib, is_ref):
    if is_ref:
        pytest.skip("errors of the module under test")
    net = Net()
    without = lib.LoraConfig(target_modules=["one"])
    with pytest.raises(ValueError, match="lora_ga_config"):
        lib.preprocess_loraga(net, without, steps(net))
    with pytest.raises(ValueError, match="linear"):
        lib.preprocess_loraga(net, config(lib, targets=["drop"]), steps(net))
    with pytest.raises(RuntimeError, match="no"):
        lib.preprocess_loraga(net, config(lib), lambda: (_ for _ in ()).throw(RuntimeError("no")))
    assert not any(m._backward_hooks for m in net.modules()) and all(p.requires_grad for p in net.parameters())
    lib.preprocess_loraga(net, config(lib), steps(net))
    before = H.snapshot(net)
    with pytest.raises(ValueError, match="2 r = 26"):
        lib.get_peft_model(net, config(lib, r=13))
    H.identical(H.snapshot(net), before)
    lib.get_peft_model(net, config(lib))  # the gradients are still there
