"""P-tuning - GPT Understands, Too.
Liu et al., 2021, https://arxiv.org/abs/2103.10385.

    model([P, e(x)])            P = MLP(E) or MLP(BiLSTM(E)) while training, E: (tokens, dim)
    parameters                  num_virtual_tokens num_transformer_submodules token_dim
                                + token_dim (2 encoder_hidden_size + 1) + encoder_hidden_size (encoder_hidden_size + 2)
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...core.config import Count, Positive, PromptLearningConfig, Share
from ...core.errors import PeftWarning
from ...model.prompt import Prompt


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig, method="P_TUNING", optional=("encoder_num_layers", "encoder_dropout")):
    """Fields of P-tuning; the encoder is needed for training only."""

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: Positive | None = None  # default: token_dim
    encoder_num_layers: Count = 2  # of the LSTM
    encoder_dropout: Share = 0.0  # of the LSTM


class PromptEncoder(Prompt, config=PromptEncoderConfig):
    """Virtual tokens made by a network, which is left out of a checkpoint and in inference mode."""

    def __init__(self, config: Any):
        super().__init__()
        self.token_dim = self.input_size = self.output_size = dim = config.token_dim
        self.hidden_size = hidden = config.encoder_hidden_size
        self.total_virtual_tokens = config.num_virtual_tokens * config.num_transformer_submodules
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(self.total_virtual_tokens, dim)  # (tokens, dim)
        self.computed = not config.inference_mode
        if not self.computed:
            return
        if self.encoder_type == "LSTM":
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(dim, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))
        else:
            if config.encoder_num_layers != 2:
                warnings.warn("`encoder_num_layers` is for the LSTM; the MLP always has 2 hidden layers.", PeftWarning)
            self.mlp_head = nn.Sequential(
                nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
            )

    def forward(self, indices: Tensor) -> Tensor:
        tokens = self.embedding(indices)  # (batch, tokens, dim)
        if not self.computed:
            return tokens
        return self.mlp_head(self.lstm_head(tokens)[0] if self.encoder_type == "LSTM" else tokens)
