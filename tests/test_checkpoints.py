"""Loading into adapters that are there already."""

import torch
from torch import nn

from minipeft import VeraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict


def test_other_adapters_keep_the_tensors_that_they_share():
    torch.manual_seed(0)
    config = VeraConfig(r=4, target_modules=["0", "1"])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), config)
    model.add_adapter("other", VeraConfig(r=4, target_modules=["0", "1"]))
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            parameter.data.normal_()
    x = torch.randn(3, 6)
    model.set_adapter("other")
    before = model(x)
    saved = get_peft_model_state_dict(model)
    loaded = {key: value + 1 if "lambda" not in key else value for key, value in saved.items()}
    assert any("lambda" not in key for key in saved)
    set_peft_model_state_dict(model, loaded)
    assert torch.equal(model(x), before)
    now = get_peft_model_state_dict(model)
    assert all(torch.equal(now[key], value) for key, value in loaded.items())
    model.set_adapter("default")
    assert not torch.allclose(model(x), before)
