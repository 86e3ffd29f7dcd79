"""Prefix tuning - Prefix-Tuning: Optimizing Continuous Prompts for Generation.
Li and Liang, 2021, https://arxiv.org/abs/2101.00190, section 4.

    attention over [P_k, K], [P_v, V] in every layer      P: (tokens, layers * 2 * dim)
    P = E, or while training P = MLP(E) with prefix_projection, E: (tokens, dim)
    parameters                  2 num_virtual_tokens num_layers token_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ...core.config import PromptLearningConfig
from ...core.errors import ConfigError
from ...model.prompt import Prefix


@dataclass
class PrefixTuningConfig(PromptLearningConfig, method="PREFIX_TUNING"):
    """Fields of prefix tuning; `encoder_hidden_size` is that of the projection, by default `token_dim`."""

    init_weights: Literal["zero"] | None = None  # a prefix of zeros; otherwise standard normal
    encoder_hidden_size: int | None = None  # of the MLP, between its two layers
    prefix_projection: bool = False  # P = MLP(E) while training, P alone is saved


class PrefixEncoder(Prefix, config=PrefixTuningConfig):
    """Keys and values of all layers for each virtual token."""

    def __init__(self, config: Any):
        super().__init__()
        width = config.num_layers * 2 * config.token_dim
        self.prefix_projection = config.prefix_projection
        self.computed = config.prefix_projection and not config.inference_mode
        if self.computed:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)  # (tokens, dim)
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size),
                nn.Tanh(),
                nn.Linear(config.encoder_hidden_size, width),
            )
        else:
            self.embedding = nn.Embedding(config.num_virtual_tokens, width)  # (tokens, layers * 2 * dim)
        if config.init_weights == "zero":
            for parameter in self.transform[2].parameters() if self.computed else self.parameters():
                nn.init.zeros_(parameter)

    def forward(self, prefix: Tensor) -> Tensor:
        tokens = self.embedding(prefix)
        return self.transform(tokens) if self.computed else tokens  # (batch, tokens, layers * 2 * dim)

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        if self.prefix_projection:
            raise ConfigError("Cannot load flattened prompt embeddings when `prefix_projection=True`.")
        super().load_prompt_embeddings(prompt_embeddings)
