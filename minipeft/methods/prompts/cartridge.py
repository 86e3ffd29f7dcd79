"""Cartridges - Lightweight and General-Purpose Long Context Representations via Self-Study.
Eyuboglu et al., 2025, https://arxiv.org/abs/2506.06266.

    attention over [P_k, K], [P_v, V] in every layer      P = [F, T]: (tokens, layers * 2 * dim)
    F: the first tokens, frozen (attention sinks); T: trained. Best begun from the cache of a text.
    parameters                  2 (num_virtual_tokens - num_frozen_tokens) num_layers token_dim
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.config import PromptLearningConfig
from ...core.errors import ConfigError
from ...model.prompt import EMBEDDINGS, Prefix


@dataclass
class CartridgeConfig(PromptLearningConfig, method="CARTRIDGE"):
    """Fields of Cartridges."""

    num_frozen_tokens: int = 1  # of the first virtual tokens

    def __post_init__(self):
        super().__post_init__()
        most = math.inf if self.num_virtual_tokens is None else self.num_virtual_tokens
        if not 0 <= self.num_frozen_tokens <= most:
            raise ConfigError(f"`num_frozen_tokens` must be between 0 and {most}, got {self.num_frozen_tokens}.")


class CartridgeEncoder(Prefix, config=CartridgeConfig):
    """Keys and values of all layers for each virtual token, held as they are."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        width = config.num_layers * 2 * config.token_dim
        self.num_frozen_tokens = frozen = config.num_frozen_tokens
        self.num_trainable_tokens = config.num_virtual_tokens - frozen
        self.frozen_embedding = nn.Parameter(torch.empty(frozen, width), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(
            torch.empty(self.num_trainable_tokens, width), requires_grad=not config.inference_mode
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all tokens from the standard normal distribution."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    @property
    def weight(self) -> Tensor:
        """All tokens, (tokens, layers * 2 * dim)."""
        frozen = self.frozen_embedding
        return self.trainable_embedding if frozen is None else torch.cat([frozen, self.trainable_embedding])

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        """Has `weight`, as the embedding of other prompts."""
        return SimpleNamespace(weight=self.weight)

    def forward(self, prefix_tokens: Tensor) -> Tensor:
        return self.weight.expand(len(prefix_tokens), -1, -1)  # (batch, tokens, layers * 2 * dim)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            if self.frozen_embedding is not None:
                self.frozen_embedding.copy_(tensors[EMBEDDINGS][: self.num_frozen_tokens])
            self.trainable_embedding.copy_(tensors[EMBEDDINGS][self.num_frozen_tokens :])
