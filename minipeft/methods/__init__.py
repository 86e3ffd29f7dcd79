"""The adapter methods: one file each, one line each, by `peft_type`. They are imported when they are asked for."""

from __future__ import annotations

import functools
import importlib

METHODS = {
    "ADALORA": "adalora.adalora",
    "ADAMSS": "adamss.adamss",
    "ADAPTION_PROMPT": "adaption_prompt",
    "BEFT": "beft",
    "BOFT": "boft",
    "C3A": "c3a",
    "CARTRIDGE": "prompts.cartridge",
    "CPT": "prompts.cpt",
    "DEFT": "deft",
    "DELORA": "delora",
    "FOURIERFT": "fourierft",
    "FROD": "frod.frod",
    "GLORA": "glora",
    "GRALORA": "gralora",
    "HIRA": "hira",
    "HRA": "hra",
    "IA3": "ia3",
    "LILY": "lily",
    "LN_TUNING": "ln_tuning",
    "LOHA": "loha",
    "LOKR": "lokr",
    "LORA": "lora.lora",
    "MISS": "miss",
    "MULTITASK_PROMPT_TUNING": "prompts.multitask_prompt_tuning",
    "OFT": "oft",
    "OSF": "osf",
    "P_TUNING": "prompts.p_tuning",
    "PEANUT": "peanut",
    "POLY": "poly",
    "PREFIX_TUNING": "prompts.prefix_tuning",
    "PROMPT_TUNING": "prompts.prompt_tuning",
    "PSOFT": "psoft",
    "PVERA": "pvera",
    "RANDLORA": "randlora",
    "ROAD": "road",
    "SHADOW": "shadow.shadow",
    "SHIRA": "shira",
    "SUPERTUNING": "supertuning",
    "TINYLORA": "tinylora",
    "TRAINABLE_TOKENS": "trainable_tokens",
    "UNILORA": "unilora",
    "VBLORA": "vblora",
    "VERA": "vera",
    "WAVEFT": "waveft",
    "XLORA": "xlora.xlora",
}


VARIANTS = {  # of methods that a field of the configuration changes: by peft_type, the module for each such field
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


@functools.cache
def load(peft_type: str) -> None:
    """Import what a method consists of: its configuration, adapter and tuner classes enter their tables."""
    for name in METHODS.get(peft_type, "").split():
        importlib.import_module(f".{name}", __name__)


@functools.cache
def load_variant(peft_type: str, field: str) -> None:
    """Import the variant of a method that a field of its configuration asks for."""
    importlib.import_module(f".{VARIANTS[peft_type][field]}", __name__)


def load_all() -> None:
    """Import every method and variant."""
    for peft_type in METHODS:
        load(peft_type)
        for field in VARIANTS.get(peft_type, ()):
            load_variant(peft_type, field)
