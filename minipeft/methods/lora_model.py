"""What a model with LoRA adapters can do besides."""

from __future__ import annotations

from ..tuner import BaseTuner


class LoraModel(BaseTuner, method="LORA"):
    """A model with LoRA adapters."""
