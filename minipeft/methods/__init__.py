"""The adapter methods: one line each. They are imported when they are asked for."""

from __future__ import annotations

from ..core import registry
from ..core.registry import load as load

# peft_type, file in this folder with configuration and adapter and, where models with it have a class of their own and
# elsewhere, that file; public names
METHODS = """
PROMPT_TUNING           | prompts.prompt_tuning           | PromptTuningConfig PromptEmbedding PromptTuningInit
MULTITASK_PROMPT_TUNING | prompts.multitask_prompt_tuning | MultitaskPromptTuningConfig MultitaskPromptTuningInit
P_TUNING                | prompts.p_tuning                | PromptEncoderConfig PromptEncoder
PREFIX_TUNING           | prompts.prefix_tuning           | PrefixTuningConfig PrefixEncoder
LORA                    | lora.lora lora.model            | LoraConfig LoraModel
ADALORA                 | adalora.adalora adalora.model   | AdaLoraConfig AdaLoraModel
ADAMSS                  | adamss.adamss adamss.allocation | AdamssConfig AdamssModel
BOFT                    | boft                            | BOFTConfig BOFTModel
ADAPTION_PROMPT         | adaption_prompt                 | AdaptionPromptConfig AdaptionPromptModel
IA3                     | ia3 ia3_model                   | IA3Config IA3Model
BEFT                    | beft                            | BeftConfig BeftModel
LILY                    | lily                            | LilyConfig LilyModel
LOHA                    | loha                            | LoHaConfig LoHaModel
LOKR                    | lokr                            | LoKrConfig LoKrModel
OFT                     | oft                             | OFTConfig OFTModel
POLY                    | poly                            | PolyConfig PolyModel
LN_TUNING               | ln_tuning                       | LNTuningConfig LNTuningModel
VERA                    | vera                            | VeraConfig VeraModel
FROD                    | frod.frod                       | FrodConfig FrodModel
PVERA                   | pvera                           | PveraConfig PveraModel
FOURIERFT               | fourierft                       | FourierFTConfig FourierFTModel
GLORA                   | glora                           | GloraConfig GloraModel
XLORA                   | xlora.xlora xlora.model         | XLoraConfig XLoraModel
HRA                     | hra                             | HRAConfig HRAModel
VBLORA                  | vblora vblora_model              | VBLoRAConfig VBLoRAModel
UNILORA                 | unilora unilora_model           | UniLoraConfig UniLoraModel
CPT                     | prompts.cpt                     | CPTConfig CPTEmbedding
MISS                    | miss                            | MissConfig MissModel
RANDLORA                | randlora                        | RandLoraConfig RandLoraModel
ROAD                    | road                            | RoadConfig RoadModel
TRAINABLE_TOKENS        | trainable_tokens                | TrainableTokensConfig TrainableTokensModel
HIRA                    | hira                            | HiraConfig HiraModel
SHIRA                   | shira                           | ShiraConfig ShiraModel
C3A                     | c3a                             | C3AConfig C3AModel
WAVEFT                  | waveft                          | WaveFTConfig WaveFTModel
OSF                     | osf                             | OSFConfig OSFModel
DELORA                  | delora                          | DeloraConfig DeloraModel
GRALORA                 | gralora                         | GraloraConfig GraloraModel
CARTRIDGE               | prompts.cartridge               | CartridgeConfig CartridgeEncoder
TINYLORA                | tinylora                        | TinyLoraConfig TinyLoraModel
PSOFT                   | psoft                           | PsoftConfig PsoftModel
PEANUT                  | peanut                          | PeanutConfig PeanutModel
SHADOW                  | shadow.shadow                   | ShadowConfig ShadowModel
SUPERTUNING             | supertuning                     | SupertuningConfig SupertuningModel
DEFT                    | deft                            | DeftConfig DeftModel
"""
FURTHER = {  # public names of other files
    "lora.arrow": "create_arrow_model",
    "lora.configs": (
        "ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig "
        "MontecloraConfig VeloraConfig"
    ),
    "lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "lora.gradient": "preprocess_loraga",
    "lora.loftq": "replace_lora_weights_loftq",
    "prompts.p_tuning": "PromptEncoderReparameterizationType",
    "prompts.prefixes": (
        "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
        "prompt_embeddings_from_past_key_values"
    ),
}
VARIANTS = {  # of methods that a field of the configuration changes
    "LORA": {
        "alora_invocation_tokens": "lora.alora",
        "arrow_config": "lora.arrow",
        "kasa_config": "lora.kasa",
        "monteclora_config": "lora.monteclora",
        "use_bdlora": "lora.bdlora",
        "use_dora": "lora.dora",
        "use_qalora": "lora.qalora",
        "velora_config": "lora.velora",
    },
}
STARTS = {  # ways to set initial values that have a file of their own
    "LORA": {"corda": "lora.corda", "loftq": "lora.loftq", "lora_ga": "lora.gradient"},
}
BESIDE = {"trainable_token_indices": "TRAINABLE_TOKENS"}  # fields of any method that add another one

NAMES: dict[str, str] = {}  # public name -> its module, below the package
for _row in METHODS.strip().splitlines():
    (_method,), _files, _public = (_column.split() for _column in _row.split("|"))
    registry.FILES[_method] = f"{__name__}.{_files[0]}"
    if len(_files) > 1:
        registry.MODELS[_method] = f"{__name__}.{_files[1]}"
    NAMES |= dict.fromkeys(_public, f"methods.{_files[0]}")
    for _name in _public:
        if _name.endswith("Model"):
            NAMES[_name], registry.TUNERS[_name] = "model.tuner", _method
for _file, _names in FURTHER.items():
    NAMES |= dict.fromkeys(_names.split(), f"methods.{_file}")
for _method, _fields in VARIANTS.items():
    registry.VARIANTS[_method] = {_field: f"{__name__}.{_file}" for _field, _file in _fields.items()}
for _method, _ways in STARTS.items():
    registry.STARTS[_method] = {_way: f"{__name__}.{_file}" for _way, _file in _ways.items()}
registry.BESIDE |= BESIDE
