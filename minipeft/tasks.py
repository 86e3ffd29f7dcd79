"""The task classes."""
from .model import PeftModel
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {}
