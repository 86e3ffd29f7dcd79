"""minipeft: the adapter methods of Hugging Face PEFT, on plain nn.Modules, from one small theory (adapter.py)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
NAMES = {  # module: what it gives to this package. A name is imported when it is first asked for.
    "compat.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
        "AutoPeftModelForTokenClassification"
    ),
    "core.state": "get_peft_model_state_dict load_peft_weights set_peft_model_state_dict",
    "core.config": "PeftConfig PeftType PromptLearningConfig TaskType get_peft_config",
    "compat.conversion": "convert_to_lora save_as_lora",
    "core.errors": (
        "AdapterNameError BatchError CheckpointError ConfigError ConfigTypeError MergeError "
        "NoMatchingPeftModuleError PeftError PeftWarning UnsupportedFeatureError UnsupportedLayerError"
    ),
    "model.factory": "get_peft_model inject_adapter_in_model",
    "compat.kappa": "find_kappa_target_modules",
    "compat.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING"
    ),
    "methods.adalora.adalora": "AdaLoraConfig AdaLoraModel",
    "methods.adamss.adamss": "AdamssConfig AdamssModel",
    "methods.adaption_prompt": "AdaptionPromptConfig AdaptionPromptModel",
    "methods.lora.arrow": "create_arrow_model",
    "methods.beft": "BeftConfig BeftModel",
    "methods.boft": "BOFTConfig BOFTModel",
    "methods.c3a": "C3AConfig C3AModel",
    "methods.prompts.cartridge": "CartridgeConfig CartridgeEncoder",
    "methods.prompts.cpt": "CPTConfig CPTEmbedding",
    "methods.deft": "DeftConfig DeftModel",
    "methods.delora": "DeloraConfig DeloraModel",
    "methods.fourierft": "FourierFTConfig FourierFTModel",
    "methods.frod.frod": "FrodConfig FrodModel",
    "methods.glora": "GloraConfig GloraModel",
    "methods.gralora": "GraloraConfig GraloraModel",
    "methods.hira": "HiraConfig HiraModel",
    "methods.hra": "HRAConfig HRAModel",
    "methods.ia3": "IA3Config IA3Model",
    "methods.lily": "LilyConfig LilyModel",
    "methods.ln_tuning": "LNTuningConfig LNTuningModel",
    "methods.loha": "LoHaConfig LoHaModel",
    "methods.lokr": "LoKrConfig LoKrModel",
    "methods.lora.lora": "LoraConfig LoraModel",
    "methods.lora.configs": (
        "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig "
        "MontecloraConfig VeloraConfig"
    ),
    "methods.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "methods.lora.gradient": "preprocess_loraga",
    "methods.lora.loftq": "replace_lora_weights_loftq",
    "methods.miss": "MissConfig MissModel",
    "methods.prompts.multitask_prompt_tuning": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "methods.oft": "OFTConfig OFTModel",
    "methods.osf": "OSFConfig OSFModel",
    "methods.prompts.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    "methods.peanut": "PeanutConfig PeanutModel",
    "methods.poly": "PolyConfig PolyModel",
    "methods.prompts.prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    "methods.prompts.prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    "methods.psoft": "PsoftConfig PsoftModel",
    "methods.pvera": "PveraConfig PveraModel",
    "methods.randlora": "RandLoraConfig RandLoraModel",
    "methods.road": "RoadConfig RoadModel",
    "methods.shadow.shadow": "ShadowConfig ShadowModel",
    "methods.shira": "ShiraConfig ShiraModel",
    "methods.supertuning": "SupertuningConfig SupertuningModel",
    "methods.tinylora": "TinyLoraConfig TinyLoraModel",
    "methods.trainable_tokens": "TrainableTokensConfig TrainableTokensModel",
    "methods.unilora": "UniLoraConfig UniLoraModel",
    "methods.vblora": "VBLoRAConfig VBLoRAModel",
    "methods.vera": "VeraConfig VeraModel",
    "methods.waveft": "WaveFTConfig WaveFTModel",
    "methods.xlora.xlora": "XLoraConfig XLoraModel",
    "model.mixed": "PeftMixedModel",
    "model.peft_model": "PeftModel",
    "methods.prompts.prefixes": (
        "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
        "prompt_embeddings_from_past_key_values"
    ),
    "model.prompt": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "model.status": "get_layer_status get_model_status",
    "model.tasks": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModelForCausalLM PeftModelForFeatureExtraction "
        "PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
        "PeftModelForTokenClassification"
    ),
    "model.utils": (
        "bloom_model_postprocess_past_key_value cast_mixed_precision_params get_base_model_state_dict "
        "prepare_model_for_kbit_training set_base_model_state_dict shift_tokens_right"
    ),
}
_WHERE = {name: module for module, names in NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    elif (value := _module(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _module(name: str) -> Any:
    """A folder, or a file in one of the folders: `minipeft.errors` is `minipeft.core.errors`."""
    for path in (name, *(f"{folder}.{name}" for folder in ("core", "model", "compat"))):
        try:
            return importlib.import_module(f".{path}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{path}":
                raise
    return None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
