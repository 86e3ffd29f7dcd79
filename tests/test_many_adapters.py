"""Many adapters on one model: what loading one more takes does not depend on how many there are."""

import sys

import pytest
import torch
from torch import nn

from minipeft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from minipeft.core import state
from minipeft.core.registry import load_all


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def calls(function, *args):
    """How many calls of Python functions that makes."""
    count = 0

    def seen(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=["0", "1"]), VeraConfig(r=2, target_modules=["0"])],
                         ids=["lora", "vera"])
def test_loading_one_more(config, tmp_path):
    load_all()  # with every variant there is
    get_peft_model(net(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(net(), tmp_path)
    taken = [calls(model.load_adapter, tmp_path, f"adapter{i}") for i in range(200)]
    assert taken[-1] < 1.4 * taken[10]
    assert calls(model.set_adapter, "adapter199") < 2 * calls(model.set_adapter, "adapter10")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_large_file_is_mapped(tmp_path):
    """Its tensors lie in the file's pages until they are taken over: there is no second copy of them."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(state.serialise({f"{i}.weight": torch.rand(1024, 1024) for i in range(3)}))
    found = state.read_weights_file(path)
    start, end = next(
        (int(part, 16) for part in line.split()[0].split("-"))
        for line in open("/proc/self/maps") if line.rstrip().endswith(str(path))
    )
    assert all(start <= tensor.data_ptr() < end for tensor in found.values())
