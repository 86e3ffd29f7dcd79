"""minipeft: the adapter methods of Hugging Face PEFT, on plain nn.Modules, from one small theory (adapter.py)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from . import methods

__version__ = "0.1.0"
NAMES = {  # module: what it gives to this package, beside the methods. A name is imported when it is first asked for.
    "compat.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
        "AutoPeftModelForTokenClassification"
    ),
    "core.state": "load_peft_weights",
    "model.checkpoint": "get_peft_model_state_dict set_peft_model_state_dict",
    "core.config": "PeftConfig PeftType PromptLearningConfig TaskType get_peft_config",
    "compat.conversion": "convert_to_lora save_as_lora",
    "core.errors": (
        "AdapterNameError BatchError CheckpointError ConfigError ConfigTypeError MergeError "
        "NoMatchingPeftModuleError NotIncludedError PeftError PeftWarning UnsupportedFeatureError UnsupportedLayerError"
    ),
    "model.factory": "get_peft_model inject_adapter_in_model",
    "compat.kappa": "find_kappa_target_modules",
    "compat.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING"
    ),
    "model.mixed": "PeftMixedModel",
    "model.prompt": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING shift_tokens_right",
    "model.status": "get_layer_status get_model_status",
    "model.tasks": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction "
        "PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
        "PeftModelForTokenClassification"
    ),
    "model.utils": (
        "bloom_model_postprocess_past_key_value cast_mixed_precision_params get_base_model_state_dict "
        "prepare_model_for_kbit_training set_base_model_state_dict"
    ),
}
WHERE = methods.NAMES | {name: module for module, names in NAMES.items() for name in names.split()}
__all__ = sorted(WHERE)


def __getattr__(name: str) -> Any:
    if name in WHERE:
        value = getattr(importlib.import_module(f".{WHERE[name]}", __name__), name)
    else:
        try:
            value = importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value


class _ByFile:
    """Finds the files in the folders by their own names too: `minipeft.errors`, `minipeft.functional`, as in peft."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        package, _, file = name.rpartition(".")
        if package == __name__ and not file.startswith("_"):
            for folder in ("core", "model", "compat"):
                if (found := importlib.util.find_spec(f"{__name__}.{folder}.{file}")) is not None:
                    return importlib.util.spec_from_loader(name, _ByFile(), origin=found.name)
        return None

    def create_module(self, spec: Any) -> Any:
        self.module = importlib.import_module(spec.origin)
        self.spec = self.module.__spec__
        return self.module

    def exec_module(self, module: Any) -> None:
        module.__spec__ = self.spec  # it is the module that it was


sys.meta_path.append(_ByFile)  # type: ignore[arg-type]  # asked last, when no such file is in the package itself


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
