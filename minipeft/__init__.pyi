# What type checkers see of this package; a test holds it to the table in __init__.py.
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .config import PeftConfig, PeftType, PromptLearningConfig, TaskType, get_peft_config
from .conversion import convert_to_lora, save_as_lora
from .errors import (
    AdapterNameError,
    BatchError,
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    MergeError,
    NoMatchingPeftModuleError,
    PeftError,
    PeftWarning,
    UnsupportedFeatureError,
    UnsupportedLayerError,
)
from .factory import get_peft_model, inject_adapter_in_model
from .kappa import find_kappa_target_modules
from .mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from .methods.adalora import AdaLoraConfig, AdaLoraModel
from .methods.adamss import AdamssConfig, AdamssModel
from .methods.adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from .methods.arrow import create_arrow_model
from .methods.beft import BeftConfig, BeftModel
from .methods.boft import BOFTConfig, BOFTModel
from .methods.c3a import C3AConfig, C3AModel
from .methods.cartridge import CartridgeConfig, CartridgeEncoder
from .methods.cpt import CPTConfig, CPTEmbedding
from .methods.deft import DeftConfig, DeftModel
from .methods.delora import DeloraConfig, DeloraModel
from .methods.fourierft import FourierFTConfig, FourierFTModel
from .methods.frod import FrodConfig, FrodModel
from .methods.glora import GloraConfig, GloraModel
from .methods.gralora import GraloraConfig, GraloraModel
from .methods.hira import HiraConfig, HiraModel
from .methods.hra import HRAConfig, HRAModel
from .methods.ia3 import IA3Config, IA3Model
from .methods.lily import LilyConfig, LilyModel
from .methods.ln_tuning import LNTuningConfig, LNTuningModel
from .methods.loha import LoHaConfig, LoHaModel
from .methods.lokr import LoKrConfig, LoKrModel
from .methods.lora import LoraConfig, LoraModel
from .methods.lora_configs import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from .methods.lora_eva import get_eva_state_dict, initialize_lora_eva_weights
from .methods.lora_ga import preprocess_loraga
from .methods.lora_loftq import replace_lora_weights_loftq
from .methods.miss import MissConfig, MissModel
from .methods.multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .methods.oft import OFTConfig, OFTModel
from .methods.osf import OSFConfig, OSFModel
from .methods.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from .methods.peanut import PeanutConfig, PeanutModel
from .methods.poly import PolyConfig, PolyModel
from .methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from .methods.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from .methods.psoft import PsoftConfig, PsoftModel
from .methods.pvera import PveraConfig, PveraModel
from .methods.randlora import RandLoraConfig, RandLoraModel
from .methods.road import RoadConfig, RoadModel
from .methods.shadow import ShadowConfig, ShadowModel
from .methods.shira import ShiraConfig, ShiraModel
from .methods.supertuning import SupertuningConfig, SupertuningModel
from .methods.tinylora import TinyLoraConfig, TinyLoraModel
from .methods.trainable_tokens import TrainableTokensConfig, TrainableTokensModel
from .methods.unilora import UniLoraConfig, UniLoraModel
from .methods.vblora import VBLoRAConfig, VBLoRAModel
from .methods.vera import VeraConfig, VeraModel
from .methods.waveft import WaveFTConfig, WaveFTModel
from .methods.xlora import XLoraConfig, XLoraModel
from .mixed import PeftMixedModel
from .model import PeftModel
from .prefixes import (
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from .prompt import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
from .status import get_layer_status, get_model_status
from .tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .utils import (
    bloom_model_postprocess_past_key_value,
    cast_mixed_precision_params,
    get_base_model_state_dict,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    shift_tokens_right,
)

__version__: str
# fmt: off
__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "AdaLoraConfig", "AdaLoraModel", "AdamssConfig",
    "AdamssModel", "AdapterNameError", "AdaptionPromptConfig", "AdaptionPromptModel", "ArrowConfig", "AutoPeftModel",
    "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification",
    "BOFTConfig", "BOFTModel", "BatchError", "BdLoraConfig", "BeftConfig", "BeftModel", "C3AConfig", "C3AModel",
    "CPTConfig", "CPTEmbedding", "CartridgeConfig", "CartridgeEncoder", "CheckpointError", "ConfigError",
    "ConfigTypeError", "CordaConfig", "DeftConfig", "DeftModel", "DeloraConfig", "DeloraModel", "EvaConfig",
    "FourierFTConfig", "FourierFTModel", "FrodConfig", "FrodModel", "GloraConfig", "GloraModel", "GraloraConfig",
    "GraloraModel", "HRAConfig", "HRAModel", "HiraConfig", "HiraModel", "IA3Config", "IA3Model", "KasaConfig",
    "LNTuningConfig", "LNTuningModel", "LilyConfig", "LilyModel", "LoHaConfig", "LoHaModel", "LoKrConfig", "LoKrModel",
    "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraModel", "LoraRuntimeConfig", "MergeError", "MissConfig",
    "MissModel", "MontecloraConfig", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError", "OFTConfig", "OFTModel", "OSFConfig", "OSFModel", "PeanutConfig", "PeanutModel",
    "PeftConfig", "PeftError", "PeftMixedModel", "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification", "PeftType", "PeftWarning", "PolyConfig", "PolyModel", "PrefixEncoder",
    "PrefixTuningConfig", "PromptEmbedding", "PromptEncoder", "PromptEncoderConfig",
    "PromptEncoderReparameterizationType", "PromptLearningConfig", "PromptTuningConfig", "PromptTuningInit",
    "PsoftConfig", "PsoftModel", "PveraConfig", "PveraModel", "RandLoraConfig", "RandLoraModel", "RoadConfig",
    "RoadModel", "ShadowConfig", "ShadowModel", "ShiraConfig", "ShiraModel", "SupertuningConfig", "SupertuningModel",
    "TaskType", "TinyLoraConfig", "TinyLoraModel", "TrainableTokensConfig", "TrainableTokensModel", "UniLoraConfig",
    "UniLoraModel", "UnsupportedFeatureError", "UnsupportedLayerError", "VBLoRAConfig", "VBLoRAModel", "VeloraConfig",
    "VeraConfig", "VeraModel", "WaveFTConfig", "WaveFTModel", "XLoraConfig", "XLoraModel",
    "bloom_model_postprocess_past_key_value", "cast_mixed_precision_params", "compose_cartridge_adapters",
    "convert_to_lora", "create_arrow_model", "find_kappa_target_modules", "get_base_model_state_dict",
    "get_eva_state_dict", "get_layer_status", "get_model_status", "get_peft_config", "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text", "initialize_lora_eva_weights",
    "inject_adapter_in_model", "load_peft_weights", "prepare_model_for_kbit_training", "preprocess_loraga",
    "prompt_embeddings_from_past_key_values", "replace_lora_weights_loftq", "save_as_lora", "set_base_model_state_dict",
    "set_peft_model_state_dict", "shift_tokens_right",
]
# fmt: on
