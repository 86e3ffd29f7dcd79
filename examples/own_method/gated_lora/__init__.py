"""Gated LoRA, a method for minipeft."""

from .method import GatedLora, GatedLoraConfig

__all__ = ["GatedLora", "GatedLoraConfig"]
