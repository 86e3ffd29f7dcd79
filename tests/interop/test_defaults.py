"""Which modules a method adapts when its configuration names none: the tables of both, and what comes of them."""

import copy
import re

import pytest
import torch
from torch import nn

METHODS = ["Lora", "IA3", "AdaLora", "OFT", "Vera", "Poly", "LNTuning", "OSF"]
CONFIGS = [f"{method}Config" for method in METHODS]
GIVEN = {"AdaLoraConfig": {"total_step": 10}, "OFTConfig": {"oft_block_size": 4}, "OSFConfig": {"effective_rank": 4}}


class Plain(nn.Module):
    """A model of no known type, whose embedding goes by another name."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def get_input_embeddings(self):
        return self.words

    def forward(self, x):
        return self.down(self.up(self.words(x)))


def transformers_model(model_type):
    transformers = pytest.importorskip("transformers")
    bert = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {
        "llama": bert,
        "gpt2": {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2},
        "bert": bert,
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    }
    config = transformers.AutoConfig.for_model(model_type, vocab_size=32, **small[model_type])
    return transformers.AutoModel.from_config(config)


def test_tables_are_those_of_peft(ref):
    from minipeft.model import defaults

    constants = pytest.importorskip("peft.utils.constants")
    names = [name for name in vars(constants) if re.fullmatch(r"TRANSFORMERS_MODELS_TO_\w+_MODULES_MAPPING", name)]
    assert len(names) > 30
    for name in names:
        assert getattr(defaults, name) == getattr(constants, name), name


def test_prefixes_are_those_of_peft(ref, lib):
    theirs, ours = ref.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, lib.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    assert {k.value: v for k, v in ours.items()} == {k.value: v for k, v in theirs.items()}


def test_a_table_is_a_copy_and_unknown_names_are_no_attributes():
    from minipeft.model import defaults

    defaults.TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING.clear()
    assert "llama" in defaults.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    with pytest.raises(AttributeError):
        getattr(defaults, "TRANSFORMERS_MODELS_TO_NOTHING_TARGET_MODULES_MAPPING")  # noqa: B009


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5"])
def test_known_models(ref, lib, config, model_type):
    """The configuration is completed as peft does it, and the same modules are adapted."""
    if not hasattr(lib, config):
        pytest.skip(f"{lib.__name__} has no {config}")
    seen, names = [], []
    for module in (ref, lib):
        given = getattr(module, config)(**GIVEN.get(config, {}))
        error = None
        try:
            names.append(module.get_peft_model(transformers_model(model_type), given).targeted_module_names)
        except (ValueError, TypeError) as refusal:  # no default, or not a kind of layer that the method adapts
            error = refusal
        unknown = "Please specify" in str(error)
        seen.append((unknown, given.target_modules, getattr(given, "feedforward_modules", None)))
        if module is ref and error is not None:
            names.append(None)
    assert seen[1] == seen[0]
    assert names[0] is None or names[1] == names[0]  # peft refuses some layers that can be adapted


@pytest.mark.parametrize("config", CONFIGS[:-1])
def test_unknown_models_are_refused(ref, lib, config):
    if not hasattr(lib, config):
        pytest.skip(f"{lib.__name__} has no {config}")
    for module in (ref, lib):
        model = Plain()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            module.get_peft_model(model, getattr(module, config)(**GIVEN.get(config, {})))
        after = model.state_dict()
        assert list(after) == list(before) and all(map(torch.equal, after.values(), before.values()))


def test_feedforward_modules_must_be_given_too(ref, lib):
    for module in (ref, lib):
        with pytest.raises(ValueError, match="feedforward_modules"):
            module.get_peft_model(Plain(), module.IA3Config(target_modules=["up"]))


def test_target_parameters_need_no_target_modules(ref, lib):
    for module in (ref, lib):
        config = module.LoraConfig(target_parameters=["up.weight"])
        assert module.get_peft_model(Plain(), config).targeted_parameter_names == ["up.weight"]
        assert config.target_modules is None


@pytest.mark.parametrize("model", [Plain, lambda: nn.Sequential(nn.Embedding(11, 8))])
def test_trainable_tokens_take_the_input_embedding(ref, lib, model):
    if not hasattr(lib, "TrainableTokensConfig"):
        pytest.skip(f"{lib.__name__} has no TrainableTokensConfig")
    seen = []
    for module in (ref, lib):
        config = module.TrainableTokensConfig(token_indices=[1, 3])
        try:
            module.get_peft_model(model(), config)
        except ValueError:
            pass
        seen.append(config.target_modules)
    assert seen[1] == seen[0]


def test_osf_falls_back_to_all_linear_layers(ref, lib):
    if not hasattr(lib, "OSFConfig"):
        pytest.skip(f"{lib.__name__} has no OSFConfig")
    assert [m.get_peft_model(Plain(), m.OSFConfig(effective_rank=4)).targeted_module_names for m in (ref, lib)] == [
        ["up", "down"],
        ["up", "down"],
    ]
