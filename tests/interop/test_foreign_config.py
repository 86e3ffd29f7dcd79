"""A configuration of another package than the one whose function takes it: the error names both, and what to do."""

import dataclasses
import types

import pytest
from torch import nn


def network():
    return nn.Sequential(nn.Linear(4, 3))


WAYS_IN = {
    "get_peft_model": lambda lib, config, tmp_path: lib.get_peft_model(network(), config),
    "mixed": lambda lib, config, tmp_path: lib.get_peft_model(network(), config, mixed=True),
    "PeftModel": lambda lib, config, tmp_path: lib.PeftModel(network(), config),
    "PeftMixedModel": lambda lib, config, tmp_path: lib.PeftMixedModel(network(), config),
    "a tuner": lambda lib, config, tmp_path: lib.LoraModel(network(), config, "default"),
    "inject": lambda lib, config, tmp_path: lib.inject_adapter_in_model(config, network()),
    "add_adapter": lambda lib, config, tmp_path: adapted(lib).add_adapter("other", config),
    "mixed add_adapter": lambda lib, config, tmp_path: adapted(lib, mixed=True).add_adapter("other", config),
    "from_pretrained": lambda lib, config, tmp_path: lib.PeftModel.from_pretrained(
        network(), saved(lib, tmp_path), config=config
    ),
    "mixed from_pretrained": lambda lib, config, tmp_path: lib.PeftMixedModel.from_pretrained(
        network(), saved(lib, tmp_path), config=config
    ),
}


def adapted(lib, **options):
    return lib.get_peft_model(network(), lib.LoraConfig(r=2, target_modules=["0"]), **options)


def saved(lib, path):
    adapted(lib).save_pretrained(str(path))
    return str(path)


def refused(way, lib, config, tmp_path):
    if lib.__name__ == "peft":
        pytest.skip("peft does not look")
    with pytest.raises(lib.PeftError) as caught:
        WAYS_IN[way](lib, config, tmp_path)
    return str(caught.value)


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_config_of_peft(way, lib, ref, tmp_path):
    message = refused(way, lib, ref.LoraConfig(r=2, target_modules=["0"]), tmp_path)
    assert "peft.tuners.lora.config.LoraConfig" in message
    assert f"Take LoraConfig from {lib.__name__}" in message
    assert f"{lib.__name__}.get_peft_config(config.to_dict())" in message


def test_the_advice_works(lib, ref):
    fields = {"r": 2, "lora_alpha": 5, "target_modules": ["0"], "task_type": "CAUSAL_LM"}
    assert lib.get_peft_config(ref.LoraConfig(**fields).to_dict()) == lib.LoraConfig(**fields)


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_config_of_another_copy(way, lib, tmp_path):
    """The classes of a vendored copy look the same, but for their module."""
    parent = types.new_class("PeftConfig", exec_body=lambda names: names.update(__module__="their.copy.config"))
    names = {"__module__": "their.copy.methods.lora", **dataclasses.asdict(lib.LoraConfig(target_modules=["0"]))}
    other = type("LoraConfig", (parent,), names)()
    assert "their.copy.methods.lora.LoraConfig" in refused(way, lib, other, tmp_path)


@pytest.mark.parametrize("way", WAYS_IN)
def test_no_config_at_all(way, lib, tmp_path):
    assert "call it: LoraConfig(...)" in refused(way, lib, lib.LoraConfig, tmp_path)
    if way != "a tuner":  # it takes configurations by name
        assert "get_peft_config" in refused(way, lib, {"peft_type": "LORA"}, tmp_path)
    assert "got str" in refused(way, lib, "LORA", tmp_path)


def test_a_config_inside_a_config(lib, ref):
    if lib is ref:
        pytest.skip("peft does not look")
    with pytest.raises(lib.PeftError, match=r"peft\.tuners\.lora\.config\.EvaConfig"):
        lib.LoraConfig(init_lora_weights="eva", eva_config=ref.tuners.lora.EvaConfig())
