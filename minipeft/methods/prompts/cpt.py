"""CPT - Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods.
Blau et al., 2024, https://arxiv.org/abs/2410.17222.

    model([P + d, e(x)])        P: (tokens, dim), embeddings of examples, frozen
    d: (tokens, dim), trained, with |d_i| <= eps * sqrt(dim / 2048), eps by the token's type
    parameters                  num_virtual_tokens token_dim

Types of token, modulo 4: 1 template of an input, 2 input, 3 template of an output, 0 label; 0 itself is none of them.
The loss, in cpt_loss.py, counts labels only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.config import Bound, PromptLearningConfig, TaskType
from ...core.errors import ConfigError
from ...model.prompt import EMBEDDINGS, Prompt
from .cpt_loss import joined_labels, label_loss
from .words import word_vectors

Size = Annotated[float, Bound("a number that is not negative", lambda value: value >= 0)]


@dataclass
class CPTConfig(PromptLearningConfig, method="CPT"):
    """Fields of CPT; the three lists have one entry for each token of the examples."""

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: Size = 1.0
    opt_projection_epsilon: Size = 0.1  # for inputs
    opt_projection_format_epsilon: Size = 0.1  # for templates
    tokenizer_name_or_path: str | None = None  # noted only

    def __post_init__(self):
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(f"CPTConfig only supports task_type = CAUSAL_LM, got {self.task_type!r}.")
        self.num_layers = self.token_dim = self.num_attention_heads = None  # read off the model every time
        self.num_transformer_submodules = 1
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        self.num_virtual_tokens = len(self.cpt_token_ids)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * self.num_virtual_tokens)
            if len(getattr(self, name)) != self.num_virtual_tokens:
                raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")


class CPTEmbedding(Prompt, config=CPTConfig):
    """The embeddings of examples, and a bounded change of them."""

    reads_words = True

    def __init__(self, config: Any, word_embeddings: Any):
        super().__init__()
        self.config = copy.deepcopy(config)
        shape = (config.num_virtual_tokens, config.token_dim)
        self.embedding = nn.Embedding(*shape)  # (tokens, dim), frozen
        if not config.inference_mode:
            self.embedding.weight = nn.Parameter(word_vectors(word_embeddings, config.cpt_token_ids, "cpt_token_ids"))
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(*shape)  # (tokens, dim)
        nn.init.zeros_(self.delta_embedding.weight)

    def forward(self, indices: Tensor) -> Tensor:
        short = self.get_projection()
        if self.training:  # projected gradient descent: the next step starts from here
            self.delta_embedding.weight.data = short
        delta = self.delta_embedding.weight
        kinds = torch.tensor(self.config.cpt_tokens_type_mask, device=delta.device) % 4
        delta = torch.where((kinds != 0).view(-1, 1), delta, delta.detach())  # labels of the examples never change
        return self.embedding(indices) + F.embedding(indices, delta + (short - delta).detach())

    def get_epsilon(self) -> Tensor:
        """The largest norm that each token's change may have, (tokens,)."""
        types = torch.tensor(self.config.cpt_tokens_type_mask)
        size = math.sqrt(self.config.token_dim / 2048)
        epsilon = torch.full(types.shape, 1e-10)
        epsilon[(types > 0) & (types % 2 == 1)] = self.config.opt_projection_format_epsilon * size
        epsilon[(types > 0) & (types % 4 == 2)] = self.config.opt_projection_epsilon * size
        return epsilon

    def get_projection(self) -> Tensor:
        """The change (tokens, dim), shortened where its norm is above the bound."""
        delta = self.delta_embedding.weight.detach().clone()
        norm = delta.norm(dim=1)
        epsilon = self.get_epsilon().to(delta)
        scale = torch.where(norm > 0, epsilon / norm.clamp(min=epsilon), torch.ones_like(norm))
        return delta * scale.view(-1, 1)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():  # a checkpoint holds the sum
            self.embedding.weight.copy_(tensors[EMBEDDINGS])
            self.delta_embedding.weight.zero_()

    def run(self, model: Any, inputs: dict[str, Any], unlabelled: int) -> Any:
        types, labels = inputs.pop("input_type_mask", None), inputs.get("labels")
        if labels is None:
            return model(**inputs)
        inputs["labels"], types = joined_labels(labels, types, self.config)
        return self.calculate_loss(model(**inputs), inputs["labels"], types, self.config)

    @staticmethod
    def calculate_loss(base_model_output: Any, labels: Tensor, cpt_type_mask: Tensor, config: Any) -> Any:
        """`base_model_output` with a loss over `labels` (batch, length), weighted by example if `config` says so."""
        base_model_output.loss = label_loss(base_model_output.logits, labels, cpt_type_mask, config)
        return base_model_output
