"""The public surface: docstrings, peft's names and configuration fields, and what `import minipeft` leaves alone."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import minipeft

FOLDER = Path(__file__).parent
PEFT_NAMES = """
    AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig
    AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
    AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
    BOFTConfig BOFTModel BdLoraConfig BeftConfig BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding
    CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig DeloraModel EvaConfig FourierFTConfig
    FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig GraloraModel HRAConfig HRAModel
    HiraConfig HiraModel IA3Config IA3Model KasaConfig LNTuningConfig LNTuningModel LilyConfig LilyModel
    LoHaConfig LoHaModel LoKrConfig LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING MissConfig MissModel MontecloraConfig MultitaskPromptTuningConfig
    MultitaskPromptTuningInit NoMatchingPeftModuleError OFTConfig OFTModel OSFConfig OSFModel
    PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeanutConfig
    PeanutModel PeftConfig PeftError PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction
    PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification
    PeftModelForTokenClassification PeftType PeftWarning PolyConfig PolyModel PrefixEncoder PrefixTuningConfig
    PromptEmbedding PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType PromptLearningConfig
    PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel PveraConfig PveraModel RandLoraConfig
    RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig ShiraModel SupertuningConfig
    SupertuningModel TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType TinyLoraConfig
    TinyLoraModel TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel
    VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel
    bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters
    convert_to_lora create_arrow_model find_kappa_target_modules get_base_model_state_dict get_eva_state_dict
    get_layer_status get_model_status get_peft_config get_peft_model get_peft_model_state_dict
    initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text initialize_lora_eva_weights
    inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training preprocess_loraga
    prompt_embeddings_from_past_key_values replace_lora_weights_loftq save_as_lora set_base_model_state_dict
    set_peft_model_state_dict shift_tokens_right
""".split()  # the public names of peft 0.21.2
FIELDS = json.loads((FOLDER / "peft_configs.json").read_text())  # of peft 0.21.2: [name, default, in __init__]
OPTIONAL = ("transformers", "peft", "bitsandbytes", "huggingface_hub", "accelerate")
CALLABLES = [n for n in minipeft.__all__ if inspect.isclass(getattr(minipeft, n)) or callable(getattr(minipeft, n))]
CLASSES = [n for n in CALLABLES if inspect.isclass(getattr(minipeft, n))]


def public_members(cls):
    """Names of a class's methods and properties that minipeft defines, its own or inherited."""
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        function = getattr(member, "fget", getattr(member, "__func__", member))
        if name[0] != "_" and inspect.isfunction(function) and function.__module__.startswith("minipeft"):
            yield name


@pytest.mark.parametrize("name", CALLABLES)
def test_public_names_have_docstrings(name):
    doc = getattr(minipeft, name).__doc__
    assert doc and not doc.startswith(f"{name}("), "a docstring of its own, not the one that @dataclass makes"


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_have_docstrings(name):
    cls = getattr(minipeft, name)
    assert [m for m in public_members(cls) if not inspect.getdoc(getattr(cls, m))] == []


def test_public_members_are_found():
    assert {"save_pretrained", "active_adapters", "from_pretrained"} <= set(public_members(minipeft.PeftModel))


def test_names_of_peft():
    assert set(PEFT_NAMES) <= set(minipeft.__all__)


def plain(value):
    """A default as JSON has it."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else getattr(value, "value", value)


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_configurations(name):
    """The same fields as in peft, in the same order, with the same defaults."""
    found = []
    for field in dataclasses.fields(getattr(minipeft, name)):
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else field.default
        assert value is not dataclasses.MISSING, f"{field.name} must have a default"
        found.append([field.name, plain(value), field.init])
    assert found == FIELDS[name]


def test_every_configuration_is_compared():
    configs = {n for n in CLASSES if n.endswith("Config")}
    assert configs - {"PromptLearningConfig", "CordaConfig"} <= set(FIELDS) and len(FIELDS) == 55


def test_import_brings_no_optional_package():
    code = f"import sys; from minipeft import *; print(*(set({OPTIONAL}) & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER.parent)
    assert seen.stdout.split() == []


def test_a_method_is_imported_when_it_is_asked_for():
    code = (
        "import sys, minipeft; minipeft.IA3Config, minipeft.get_peft_model;"
        "print('minipeft.methods.lora.lora' in sys.modules);"
        "print(minipeft.get_peft_config({'peft_type': 'LORA'}).__module__)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER.parent)
    assert seen.stdout.split() == ["False", "minipeft.methods.lora.configs"]


@pytest.mark.parametrize("peft_type", minipeft.PeftType)
def test_the_table_of_methods_is_whole(peft_type):
    assert minipeft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]._method is peft_type
    assert peft_type in minipeft.PEFT_TYPE_TO_TUNER_MAPPING


def test_type_checkers_see_the_names_that_there_are():
    stub = FOLDER.parent / "tools/stub.py"
    subprocess.run([sys.executable, stub, "--check"], check=True, env={**os.environ, "PYTHONPATH": str(FOLDER.parent)})
    assert all(hasattr(minipeft, name) for name in minipeft.__all__)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is of Python 3.11")
def test_get_peft_model_is_typed_by_whether_it_is_mixed():
    returned = [typing.get_type_hints(f)["return"] for f in typing.get_overloads(minipeft.get_peft_model)]
    plain, mixed = minipeft.PeftModel, minipeft.PeftMixedModel
    assert returned == [plain, mixed, plain | mixed]
