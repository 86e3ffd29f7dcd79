"""What must hold on an accelerator as it does on the CPU. Skipped without CUDA."""

import copy

import pytest
import torch
from torch import nn

import minipeft as mp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIGS = {
    "lora": lambda: mp.LoraConfig(r=4, target_modules=["0", "2"]),
    "dora": lambda: mp.LoraConfig(r=4, target_modules=["0", "2"], use_dora=True),
    "ia3": lambda: mp.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "oft": lambda: mp.OFTConfig(oft_block_size=4, target_modules=["0", "2"]),
    "vera": lambda: mp.VeraConfig(r=8, target_modules=["0", "2"]),
}


def adapted(config, dtype=torch.float32):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12)).to(dtype)
    model = mp.get_peft_model(network, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


def test_same_numbers_as_on_the_cpu(config):
    model, x = adapted(config), torch.randn(5, 8)
    there = copy.deepcopy(model).cuda()
    model(x).square().sum().backward()
    there(x.cuda()).square().sum().backward()
    torch.testing.assert_close(there(x.cuda()).cpu(), model(x), rtol=1e-4, atol=1e-5)
    for (name, here), other in zip(model.named_parameters(), there.parameters()):
        if here.grad is not None:
            torch.testing.assert_close(other.grad.cpu(), here.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_changes_no_bit(config, dtype):
    model = adapted(config, dtype).cuda()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_loaded_onto_the_device_of_the_model(config, tmp_path):
    model, x = adapted(config), torch.randn(5, 8)
    model.save_pretrained(tmp_path)
    again = mp.PeftModel.from_pretrained(copy.deepcopy(model.unload()).cuda(), tmp_path)
    assert {p.device.type for p in again.parameters()} == {"cuda"}
    torch.testing.assert_close(again(x.cuda()).cpu(), adapted(config)(x), rtol=1e-4, atol=1e-5)


def test_autocast(config):
    model, x = adapted(config).cuda(), torch.randn(5, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
        y.sum().backward()
    torch.testing.assert_close(y.float(), model(x), rtol=5e-2, atol=5e-2)


def test_dora_starts_on_the_accelerator():
    config = CONFIGS["dora"]()
    config.runtime_config.ephemeral_gpu_offload = True
    here, there = adapted(CONFIGS["dora"]()), adapted(config)
    for one, other in zip(here.parameters(), there.parameters()):
        assert other.device.type == "cpu"
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
