"""What `modules_to_save` means: as in PEFT, any end of a path."""

import pytest
from torch import nn

import minipeft


def net():
    """A classifier as DistilBERT has it: the layer before the head ends in the head's name."""
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "pre_classifier", "classifier")})


def saved(**config):
    model = minipeft.get_peft_model(net(), minipeft.LoraConfig(r=2, **config))
    state = minipeft.get_peft_model_state_dict(model)
    return sorted(k.split(".")[2] for k in state if "lora" not in k and k.endswith("weight"))


def test_a_name_means_what_ends_with_it_without_a_dot():
    assert saved(target_modules=["query"], modules_to_save=["classifier"]) == ["classifier", "pre_classifier"]
    assert saved(target_modules=["query"], modules_to_save=["pre_classifier"]) == ["pre_classifier"]


def test_what_would_be_adapted_and_saved_is_refused():
    with pytest.raises(minipeft.UnsupportedLayerError, match=r"pre_classifier.*exclude_modules"):
        saved(target_modules="all-linear", modules_to_save=["classifier"])
    out = saved(target_modules="all-linear", modules_to_save=["classifier"], exclude_modules=["pre_classifier"])
    assert out == ["classifier", "pre_classifier"]
