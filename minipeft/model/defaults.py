"""Which modules a method adapts when its configuration names none, by the model type of transformers' models.

The tables hold PEFT's choices: modules -> model types that have these. A value with a `*` is a regular expression for
the whole path; all others are module names. Methods without a table of their own take LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.errors import ConfigError
from .tying import input_embedding

Table = dict[str, list[str] | str]  # model type -> modules
TEXT_OF_GEMMA4 = r".*language_model\..*\.(q_proj|v_proj)"


def _table(rows: dict[str, str]) -> Table:
    return {kind: row if "*" in row else row.split() for row, kinds in rows.items() for kind in kinds.split()}


LORA = _table(
    {
        "q_proj v_proj": (
            "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm"
        ),
        "query value": "bert electra layoutlm roberta xlm-roberta",
        "query_key_value": "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
        "q v": "mt5 t5",
        "c_attn": "gpt2 gpt_bigcode",
        "q v q_proj v_proj": "blip-2",
        "q_proj v_proj fc1 fc2": "phi",
        "query_proj value_proj": "deberta-v2",
        "in_proj": "deberta",
        "Wqkv": "mpt",
        "c_proj c_attn": "btlm",
        "qkv_proj": "codegen",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "key value receptance output": "rwkv",
        "r_proj k_proj v_proj o_proj key value": "rwkv7",
        TEXT_OF_GEMMA4: "gemma4",
    }
)
VBLORA = _table(
    {
        "q_proj v_proj": "gemma gemma2 gemma3_text gpt_neo gptj llama llama4 qwen2 qwen3",
        "query value": "bert roberta",
        "query_key_value": "bloom gpt_neox",
        "q k v o wi wo": "t5",
        "q k v o wi_0 wi_1 wo": "mt5",
        "c_attn": "gpt2 gpt_bigcode",
        "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
        "query_proj key_proj value_proj dense": "deberta-v2",
        "in_proj": "deberta",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        TEXT_OF_GEMMA4: "gemma4",
    }
)
BEFT = _table(
    {
        "v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3",
        "value": "bert roberta",
        "v": "mt5 t5",
        "value_proj": "deberta-v2",
    }
)
IA3 = _table(
    {
        "q_proj v_proj down_proj": "gemma gemma2 gemma3_text llama4 qwen2 qwen3",
        "k_proj v_proj down_proj": "llama mistral",
        "k_proj v_proj w2": "mixtral",
        "key value output.dense": "bert roberta",
        "query_key_value dense_4h_to_h": "RefinedWeb RefinedWebModel falcon gpt_neox",
        "query_key_value mlp.dense_4h_to_h": "bloom",
        "k v wo": "t5",
        "k v wi_1": "mt5",
        "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
        "q_proj k_proj fc2": "opt",
        "q_proj v_proj fc2": "bart phi",
        "q_proj v_proj fc_out": "gptj",
        "q_proj v_proj c_proj": "gpt_neo",
        "key_proj value_proj output.dense": "deberta-v2",
        "in_proj output.dense": "deberta",
    }
)
IA3_FEEDFORWARD = _table(
    {
        "down_proj": "gemma gemma2 gemma3_text llama llama4 mistral qwen2 qwen3",
        "w2": "mixtral",
        "output.dense": "bert deberta deberta-v2 roberta",
        "dense_4h_to_h": "RefinedWeb RefinedWebModel falcon gpt_neox",
        "mlp.dense_4h_to_h": "bloom",
        "wo": "t5",
        "": "mt5",
        "mlp.c_proj": "gpt2 gpt_bigcode",
        "fc2": "bart opt phi",
        "fc_out": "gptj",
        "c_proj": "gpt_neo",
    }
)
LN_TUNING = _table(
    {
        "input_layernorm post_attention_layernorm norm": "gemma llama mistral",
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": (
            "gemma2 gemma3_text"
        ),
        "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
        "input_layernorm final_layernorm": "phi",
        "post_attention_layernorm": "qwen2 qwen3",
        "layer_norm final_layer_norm": "mt5 t5",
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
        "ln_1 ln_2 ln_f": "gpt2",
        "ln_1 ln_f": "gptj",
        "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
    }
)
OSF = _table(
    {
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": (
            "gemma gemma2 gemma3_text llama llama4 mistral mixtral phi qwen2 qwen3"
        ),
        "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
        "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        "query_key_value dense_4h_to_h": "bloom falcon gpt_neox",
        "c_attn c_proj": "gpt2 gpt_bigcode",
    }
)
ATTENTION_OF_PHI = LORA | {"phi": ["q_proj", "v_proj"]}
MLP_OF_GPT2 = LORA | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

TARGETS: dict[str, Table] = {  # by peft_type
    "ADALORA": VBLORA | {"roberta": ["query", "key", "value", "dense"]},
    "ADAMSS": LORA | {"vit": ["query", "value"]},
    "BEFT": BEFT,
    "C3A": MLP_OF_GPT2,
    "FOURIERFT": MLP_OF_GPT2,
    "FROD": ATTENTION_OF_PHI | {"vit": ["query", "value"]},
    "IA3": IA3,
    "LN_TUNING": LN_TUNING,
    "OSF": OSF,
    "PVERA": ATTENTION_OF_PHI | {"dinov2": ["query", "value"]},
    "SHIRA": ATTENTION_OF_PHI,
    "TRAINABLE_TOKENS": {},
    "VBLORA": VBLORA,
    "VERA": ATTENTION_OF_PHI,
    "WAVEFT": {kind: row for kind, row in MLP_OF_GPT2.items() if kind not in ("btlm", "rwkv", "rwkv7")},
}
FEEDFORWARD: dict[str, Table] = {"IA3": IA3_FEEDFORWARD}


NEVER_CALLED: dict[Any, tuple[str, ...]] = dict.fromkeys(  # modules whose weights fused kernels read, by model type
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("conv1d", "out_proj")
)


def embedding_path(model: nn.Module) -> str:
    """Where a model's input embedding stands in it; "embed_tokens" for models that do not tell."""
    return input_embedding(model)[0] or "embed_tokens"


OTHERWISE: dict[str, Callable[[nn.Module], str]] = {  # for model types that are in no table
    "OSF": lambda model: "all-linear",
    "TRAINABLE_TOKENS": embedding_path,
}


def default_targets(config: Any, model: nn.Module, model_type: str | None) -> None:
    """Set what `config` leaves open of `target_modules` and `feedforward_modules`, for a known `model_type`.

    Raises `ConfigError` for model types without a default, unless the configuration has `target_parameters`.
    """
    method = config.peft_type.value
    found: dict[str, Any] = {}
    for field, tables in (("target_modules", {method: LORA} | TARGETS), ("feedforward_modules", FEEDFORWARD)):
        if method not in tables or getattr(config, field, ...) is not None:
            continue
        if (modules := tables[method].get(model_type or "")) is not None:
            found[field] = modules if isinstance(modules, str) else set(modules)
        elif field == "target_modules" and method in OTHERWISE:
            found[field] = OTHERWISE[method](model)
        elif not getattr(config, "target_parameters", None):
            either = " or `target_parameters`" if hasattr(config, "target_parameters") else ""
            raise ConfigError(
                f"Please specify `{field}`{either} in `peft_config`: "
                f"{method} has no default for models of type {model_type or 'unknown'!r}."
            )
    for field, modules in found.items():
        setattr(config, field, modules)


def __getattr__(name: str) -> Table:
    """PEFT's tables under PEFT's names: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING and its like."""
    from ..core.config import PeftType

    method = name.removeprefix("TRANSFORMERS_MODELS_TO_")
    if name == "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING":
        return dict(IA3_FEEDFORWARD)
    kind = next((k for k in PeftType if f"{k.value.replace('_', '')}_TARGET_MODULES_MAPPING" == method), None)
    if method == name or kind is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return dict(TARGETS.get(kind.value, LORA))
