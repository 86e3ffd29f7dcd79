"""What a model with VB-LoRA adapters tells of the size of its checkpoint."""

from __future__ import annotations

from typing import Any

from ..model.tuner import BaseTuner
from .vblora_topk import BANK, LOGITS, index_dtype


class VBLoRAModel(BaseTuner, method="VBLORA"):
    """A model with VB-LoRA adapters."""

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """(VB-LoRA's, other) numbers in a checkpoint of `adapter`, counted in units of four bytes."""
        config: Any = self.peft_config[adapter]
        logits = bank = other = 0
        for name, p in self.named_parameters():
            logits += p.numel() * (LOGITS in name)
            bank += p.numel() * (BANK in name)
            other += p.numel() * (LOGITS not in name and BANK not in name and p.requires_grad)
        if not config.save_only_topk_weights:
            return bank + logits, other
        pieces = logits / config.num_vectors
        return int(bank + pieces * (config.topk - 1 + config.topk * index_dtype(config).itemsize / 4)), other

    def print_savable_parameters(self) -> None:
        """Print these numbers of the default adapter."""
        own, other = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} "
            f"|| total params to-be-saved: {own + other:,d}"
        )
