"""Trainable tokens - training some rows of an embedding. PEFT's own method; as in Hewitt's note on new tokens,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html.

    W'[:, t_i] = D[i]            W: (dim, tokens), t: the token indices, D: (number of indices, dim), at first W[:, t_i]
    parameters                   len(token_indices) dim

It is a method of its own (`TrainableTokensConfig`), and a part of others (`trainable_token_indices`), where the
embedding sits one level deeper: `embed_tokens.token_adapter.trainable_tokens_delta.default`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Transform
from ..core.config import PeftConfig
from ..core.errors import ConfigError


@dataclass
class TrainableTokensConfig(PeftConfig, method="TRAINABLE_TOKENS"):
    """Fields of trainable tokens."""

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None  # the input embedding, if None
    init_weights: bool = True  # as they are in the model; otherwise standard normal


class TrainableTokens(Transform, config=TrainableTokensConfig):
    prefix = "trainable_tokens_"
    ties = True
    bases = ("Embedding", "Linear")  # a linear layer's rows, for heads tied to the embedding

    @classmethod
    def is_saved(cls, slot: str, config: Any) -> bool:
        return slot == "trainable_tokens_delta"

    def build(self) -> None:
        self.token_indices = list(self.config.token_indices)
        if not self.token_indices or len(set(self.token_indices)) < len(self.token_indices):
            raise ConfigError(f"Token indices must be given, each once, got {self.token_indices}.")
        rows = self.rows(self.base.read()[0].detach())
        if not 0 <= min(self.token_indices) <= max(self.token_indices) < len(rows):
            bounds = f"from 0 to {len(rows) - 1} for '{self.path}'"
            raise ConfigError(f"Token indices must be {bounds}, got {self.token_indices}.")
        original = rows[self.index(rows)].clone()  # (n, dim)
        start = original.clone() if self.config.init_weights else torch.randn(original.shape)
        self.trainable_tokens_delta = nn.Parameter(start)
        self.trainable_tokens_original = original

    def tie_to(self, source: Any, fresh: bool = False) -> None:
        if self.trainable_tokens_delta is not source.trainable_tokens_delta:
            self.trainable_tokens_delta = source.trainable_tokens_delta
            self.trainable_tokens_original = source.trainable_tokens_original

    def rows(self, W: Tensor) -> Tensor:
        return W.T if not self.base.reads_vectors else W  # (tokens, dim), from the canonical layout

    def index(self, like: Tensor) -> Tensor:
        return torch.tensor(self.token_indices, device=like.device)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_overlap()
        rows = self.rows(W)
        return self.rows(rows.index_copy(0, self.index(rows), self.trainable_tokens_delta.to(rows.dtype))), b

    def check_overlap(self) -> None:
        """Raise `ConfigError` when two adapters that are on, or merged, together train the same token."""
        merged, active = self.layer.merged_adapters, self.layer.active_adapters
        others = [*merged, *active] if self.name in active else merged
        taken: set[int] = set()
        for name in dict.fromkeys([*(name for name in others if name in self.layer.adapters), self.name]):
            indices = self.layer.take("token_indices", name)
            if taken & set(indices):
                both = sorted(taken & set(indices))
                raise ConfigError(f"Adapter {name} trains tokens that another active adapter trains as well: {both}.")
            taken |= set(indices)
