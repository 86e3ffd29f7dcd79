"""What adding an adapter leaves as it was: the garbage collector, modes, torch's random numbers."""

import gc
import math

import pytest
import torch
from torch import nn

from minipeft import LoraConfig, get_peft_model
from minipeft.core.errors import NoMatchingPeftModuleError


@pytest.fixture
def collector():
    on = gc.isenabled()
    yield
    (gc.enable if on else gc.disable)()


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("target", ["0", "nothing"])
def test_garbage_collector(on, target, collector):
    (gc.enable if on else gc.disable)()
    try:
        get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(target_modules=[target]))
    except NoMatchingPeftModuleError:
        assert target == "nothing"
    assert gc.isenabled() is on


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_modes(training, mixed):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train(training)
    net[1].train(not training)  # as one freezes the statistics of a batch norm
    model = get_peft_model(net, LoraConfig(target_modules=["0", "2"]), mixed=mixed)
    assert model.training is training and net[1].training is not training
    adapted = [m for name, m in model.named_modules() if "lora" in name and name.endswith("default")]
    assert adapted and all(m.training is training for m in adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 6, 8), (3, 5, 7), (3, 5, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_random_numbers(sizes, bias, dtype):
    """The factors and whatever is drawn next are as if PEFT had built the adapter: nn.Linear twice, then A again."""
    r, n_in, n_out = sizes
    torch.set_default_dtype(dtype)
    try:
        net = nn.Sequential(nn.Linear(n_in, n_out))
        torch.manual_seed(0)
        model = get_peft_model(net, LoraConfig(target_modules=["0"], r=r, lora_bias=bias), autocast_adapter_dtype=False)
        after = torch.rand(5)
        torch.manual_seed(0)
        A, _ = nn.Linear(n_in, r, bias=False), nn.Linear(r, n_out, bias=bias)
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        assert torch.equal(after, torch.rand(5))
    finally:
        torch.set_default_dtype(torch.float32)
    layer = model.base_model.model[0]
    assert torch.equal(layer.lora_A["default"].weight, A.weight)
    assert all(not p.any() for p in layer.lora_B["default"].parameters())


def test_loading_puts_everything_into_eval_mode(tmp_path):
    network = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)))
    model = get_peft_model(network, LoraConfig(target_modules=r"0", lora_dropout=0.5))
    model.save_pretrained(tmp_path)
    for train in (model.eval, model.train, model.base_model.model[1].train, model.base_model.model[1][0].train):
        model.eval()
        train()
        model.load_adapter(tmp_path, f"other{len(model.peft_config)}")
        assert not [name for name, module in model.named_modules() if module.training]
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    assert not model.training
