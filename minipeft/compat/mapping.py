"""PEFT's tables from `peft_type` to the classes of a method."""

from __future__ import annotations

from typing import Any

from ..core import registry
from ..core.adapter import ADAPTERS
from ..core.config import CONFIGS, PeftType
from ..model.mixed import COMPATIBLE_TUNER_TYPES
from ..model.prompt import PROMPTS
from ..model.tuner import tuner_class

registry.load_all()  # which fill the tables

PEFT_TYPE_TO_CONFIG_MAPPING = CONFIGS
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, Any] = {k: PROMPTS.get(k) or tuner_class(k) for k in CONFIGS}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = {kind: tuner_class(kind) for kind in COMPATIBLE_TUNER_TYPES}
PEFT_TYPE_TO_PREFIX_MAPPING = {
    **{kind: f"{kind.value.lower()}_" for kind in CONFIGS},
    **{kind: classes[0].prefix for kind, classes in ADAPTERS.items()},
    PeftType.FROD: "frod_",  # PEFT: also of what is not trained
    PeftType.XLORA: "xlora_",  # PEFT: of nothing that there is
}
