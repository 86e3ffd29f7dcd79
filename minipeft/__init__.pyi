# What type checkers and editors see of this package. Written by tools/stub.py.
from .compat.auto import (
    AutoPeftModel as AutoPeftModel,
    AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
)
from .compat.conversion import (
    convert_to_lora as convert_to_lora,
    save_as_lora as save_as_lora,
)
from .compat.kappa import (
    find_kappa_target_modules as find_kappa_target_modules,
)
from .compat.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING as PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING,
)
from .core.config import (
    PeftConfig as PeftConfig,
    PeftType as PeftType,
    PromptLearningConfig as PromptLearningConfig,
    TaskType as TaskType,
    get_peft_config as get_peft_config,
)
from .core.errors import (
    AdapterNameError as AdapterNameError,
    BatchError as BatchError,
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    ConfigTypeError as ConfigTypeError,
    MergeError as MergeError,
    NoMatchingPeftModuleError as NoMatchingPeftModuleError,
    NotIncludedError as NotIncludedError,
    PeftError as PeftError,
    PeftWarning as PeftWarning,
    UnsupportedFeatureError as UnsupportedFeatureError,
    UnsupportedLayerError as UnsupportedLayerError,
)
from .core.state import (
    load_peft_weights as load_peft_weights,
)
from .methods.adalora.adalora import (
    AdaLoraConfig as AdaLoraConfig,
)
from .methods.adamss.adamss import (
    AdamssConfig as AdamssConfig,
)
from .methods.adaption_prompt import (
    AdaptionPromptConfig as AdaptionPromptConfig,
)
from .methods.beft import (
    BeftConfig as BeftConfig,
)
from .methods.boft import (
    BOFTConfig as BOFTConfig,
)
from .methods.c3a import (
    C3AConfig as C3AConfig,
)
from .methods.deft import (
    DeftConfig as DeftConfig,
)
from .methods.delora import (
    DeloraConfig as DeloraConfig,
)
from .methods.fourierft import (
    FourierFTConfig as FourierFTConfig,
)
from .methods.frod.frod import (
    FrodConfig as FrodConfig,
)
from .methods.glora import (
    GloraConfig as GloraConfig,
)
from .methods.gralora import (
    GraloraConfig as GraloraConfig,
)
from .methods.hira import (
    HiraConfig as HiraConfig,
)
from .methods.hra import (
    HRAConfig as HRAConfig,
)
from .methods.ia3 import (
    IA3Config as IA3Config,
)
from .methods.lily import (
    LilyConfig as LilyConfig,
)
from .methods.ln_tuning import (
    LNTuningConfig as LNTuningConfig,
)
from .methods.loha import (
    LoHaConfig as LoHaConfig,
)
from .methods.lokr import (
    LoKrConfig as LoKrConfig,
)
from .methods.lora.arrow import (
    create_arrow_model as create_arrow_model,
)
from .methods.lora.configs import (
    ArrowConfig as ArrowConfig,
    BdLoraConfig as BdLoraConfig,
    CordaConfig as CordaConfig,
    EvaConfig as EvaConfig,
    KasaConfig as KasaConfig,
    LoftQConfig as LoftQConfig,
    LoraGAConfig as LoraGAConfig,
    LoraRuntimeConfig as LoraRuntimeConfig,
    MontecloraConfig as MontecloraConfig,
    VeloraConfig as VeloraConfig,
)
from .methods.lora.eva import (
    get_eva_state_dict as get_eva_state_dict,
    initialize_lora_eva_weights as initialize_lora_eva_weights,
)
from .methods.lora.gradient import (
    preprocess_loraga as preprocess_loraga,
)
from .methods.lora.loftq import (
    replace_lora_weights_loftq as replace_lora_weights_loftq,
)
from .methods.lora.lora import (
    LoraConfig as LoraConfig,
)
from .methods.miss import (
    MissConfig as MissConfig,
)
from .methods.oft import (
    OFTConfig as OFTConfig,
)
from .methods.osf import (
    OSFConfig as OSFConfig,
)
from .methods.peanut import (
    PeanutConfig as PeanutConfig,
)
from .methods.poly import (
    PolyConfig as PolyConfig,
)
from .methods.prompts.cartridge import (
    CartridgeConfig as CartridgeConfig,
    CartridgeEncoder as CartridgeEncoder,
)
from .methods.prompts.cpt import (
    CPTConfig as CPTConfig,
    CPTEmbedding as CPTEmbedding,
)
from .methods.prompts.multitask_prompt_tuning import (
    MultitaskPromptTuningConfig as MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit as MultitaskPromptTuningInit,
)
from .methods.prompts.p_tuning import (
    PromptEncoder as PromptEncoder,
    PromptEncoderConfig as PromptEncoderConfig,
    PromptEncoderReparameterizationType as PromptEncoderReparameterizationType,
)
from .methods.prompts.prefix_tuning import (
    PrefixEncoder as PrefixEncoder,
    PrefixTuningConfig as PrefixTuningConfig,
)
from .methods.prompts.prefixes import (
    compose_cartridge_adapters as compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text as initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values,
)
from .methods.prompts.prompt_tuning import (
    PromptEmbedding as PromptEmbedding,
    PromptTuningConfig as PromptTuningConfig,
    PromptTuningInit as PromptTuningInit,
)
from .methods.psoft import (
    PsoftConfig as PsoftConfig,
)
from .methods.pvera import (
    PveraConfig as PveraConfig,
)
from .methods.randlora import (
    RandLoraConfig as RandLoraConfig,
)
from .methods.road import (
    RoadConfig as RoadConfig,
)
from .methods.shadow.shadow import (
    ShadowConfig as ShadowConfig,
)
from .methods.shira import (
    ShiraConfig as ShiraConfig,
)
from .methods.supertuning import (
    SupertuningConfig as SupertuningConfig,
)
from .methods.tinylora import (
    TinyLoraConfig as TinyLoraConfig,
)
from .methods.trainable_tokens import (
    TrainableTokensConfig as TrainableTokensConfig,
)
from .methods.unilora import (
    UniLoraConfig as UniLoraConfig,
)
from .methods.vblora import (
    VBLoRAConfig as VBLoRAConfig,
)
from .methods.vera import (
    VeraConfig as VeraConfig,
)
from .methods.waveft import (
    WaveFTConfig as WaveFTConfig,
)
from .methods.xlora.xlora import (
    XLoraConfig as XLoraConfig,
)
from .model.checkpoint import (
    get_peft_model_state_dict as get_peft_model_state_dict,
    set_peft_model_state_dict as set_peft_model_state_dict,
)
from .model.factory import (
    get_peft_model as get_peft_model,
    inject_adapter_in_model as inject_adapter_in_model,
)
from .model.mixed import (
    PeftMixedModel as PeftMixedModel,
)
from .model.prompt import (
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    shift_tokens_right as shift_tokens_right,
)
from .model.status import (
    get_layer_status as get_layer_status,
    get_model_status as get_model_status,
)
from .model.tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel as PeftModel,
    PeftModelForCausalLM as PeftModelForCausalLM,
    PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification as PeftModelForSequenceClassification,
    PeftModelForTokenClassification as PeftModelForTokenClassification,
)
from .model.tuner import (
    AdaLoraModel as AdaLoraModel,
    AdamssModel as AdamssModel,
    AdaptionPromptModel as AdaptionPromptModel,
    BOFTModel as BOFTModel,
    BeftModel as BeftModel,
    C3AModel as C3AModel,
    DeftModel as DeftModel,
    DeloraModel as DeloraModel,
    FourierFTModel as FourierFTModel,
    FrodModel as FrodModel,
    GloraModel as GloraModel,
    GraloraModel as GraloraModel,
    HRAModel as HRAModel,
    HiraModel as HiraModel,
    IA3Model as IA3Model,
    LNTuningModel as LNTuningModel,
    LilyModel as LilyModel,
    LoHaModel as LoHaModel,
    LoKrModel as LoKrModel,
    LoraModel as LoraModel,
    MissModel as MissModel,
    OFTModel as OFTModel,
    OSFModel as OSFModel,
    PeanutModel as PeanutModel,
    PolyModel as PolyModel,
    PsoftModel as PsoftModel,
    PveraModel as PveraModel,
    RandLoraModel as RandLoraModel,
    RoadModel as RoadModel,
    ShadowModel as ShadowModel,
    ShiraModel as ShiraModel,
    SupertuningModel as SupertuningModel,
    TinyLoraModel as TinyLoraModel,
    TrainableTokensModel as TrainableTokensModel,
    UniLoraModel as UniLoraModel,
    VBLoRAModel as VBLoRAModel,
    VeraModel as VeraModel,
    WaveFTModel as WaveFTModel,
    XLoraModel as XLoraModel,
)
from .model.utils import (
    bloom_model_postprocess_past_key_value as bloom_model_postprocess_past_key_value,
    cast_mixed_precision_params as cast_mixed_precision_params,
    get_base_model_state_dict as get_base_model_state_dict,
    prepare_model_for_kbit_training as prepare_model_for_kbit_training,
    set_base_model_state_dict as set_base_model_state_dict,
)

__version__: str
# fmt: off
__all__ = [
    "AdaLoraConfig", "AdaLoraModel", "AdamssConfig", "AdamssModel", "AdapterNameError", "AdaptionPromptConfig",
    "AdaptionPromptModel", "ArrowConfig", "AutoPeftModel", "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification", "BOFTConfig", "BOFTModel",
    "BatchError", "BdLoraConfig", "BeftConfig", "BeftModel", "C3AConfig", "C3AModel", "CPTConfig", "CPTEmbedding",
    "CartridgeConfig", "CartridgeEncoder", "CheckpointError", "ConfigError", "ConfigTypeError", "CordaConfig",
    "DeftConfig", "DeftModel", "DeloraConfig", "DeloraModel", "EvaConfig", "FourierFTConfig", "FourierFTModel",
    "FrodConfig", "FrodModel", "GloraConfig", "GloraModel", "GraloraConfig", "GraloraModel", "HRAConfig",
    "HRAModel", "HiraConfig", "HiraModel", "IA3Config", "IA3Model", "KasaConfig", "LNTuningConfig", "LNTuningModel",
    "LilyConfig", "LilyModel", "LoHaConfig", "LoHaModel", "LoKrConfig", "LoKrModel", "LoftQConfig", "LoraConfig",
    "LoraGAConfig", "LoraModel", "LoraRuntimeConfig", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "MergeError",
    "MissConfig", "MissModel", "MontecloraConfig", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError", "NotIncludedError", "OFTConfig", "OFTModel", "OSFConfig", "OSFModel",
    "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING", "PeanutConfig", "PeanutModel", "PeftConfig", "PeftError", "PeftMixedModel",
    "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType",
    "PeftWarning", "PolyConfig", "PolyModel", "PrefixEncoder", "PrefixTuningConfig", "PromptEmbedding",
    "PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType", "PromptLearningConfig",
    "PromptTuningConfig", "PromptTuningInit", "PsoftConfig", "PsoftModel", "PveraConfig", "PveraModel",
    "RandLoraConfig", "RandLoraModel", "RoadConfig", "RoadModel", "ShadowConfig", "ShadowModel", "ShiraConfig",
    "ShiraModel", "SupertuningConfig", "SupertuningModel",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "TaskType", "TinyLoraConfig", "TinyLoraModel",
    "TrainableTokensConfig", "TrainableTokensModel", "UniLoraConfig", "UniLoraModel", "UnsupportedFeatureError",
    "UnsupportedLayerError", "VBLoRAConfig", "VBLoRAModel", "VeloraConfig", "VeraConfig", "VeraModel",
    "WaveFTConfig", "WaveFTModel", "XLoraConfig", "XLoraModel", "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params", "compose_cartridge_adapters", "convert_to_lora", "create_arrow_model",
    "find_kappa_target_modules", "get_base_model_state_dict", "get_eva_state_dict", "get_layer_status",
    "get_model_status", "get_peft_config", "get_peft_model", "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text", "initialize_lora_eva_weights",
    "inject_adapter_in_model", "load_peft_weights", "prepare_model_for_kbit_training", "preprocess_loraga",
    "prompt_embeddings_from_past_key_values", "replace_lora_weights_loftq", "save_as_lora",
    "set_base_model_state_dict", "set_peft_model_state_dict", "shift_tokens_right",
]
# fmt: on
