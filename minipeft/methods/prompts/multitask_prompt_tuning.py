"""Multitask prompt tuning - Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning.
Wang et al., 2023, https://arxiv.org/abs/2303.02861.

    model([P_k, e(x)])          P_k = P * (U_k V_k) for task k
    P: (tokens, dim) of all tasks, U: (tasks, tokens, ranks), V: (tasks, ranks, dim)
    parameters                  num_virtual_tokens num_transformer_submodules (token_dim + num_tasks num_ranks)
                                + num_tasks num_ranks token_dim
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.config import Positive
from ...core.errors import BatchError, ConfigError
from ...core.state import Entry, check, read_weights_file
from ...model.prompt import EMBEDDINGS
from .prompt_tuning import Begun, PromptTuningConfig


class MultitaskPromptTuningInit(str, enum.Enum):
    """What a prompt is at the start; the last three read a prompt that was trained on other tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"  # P, and the means of U and V over the tasks
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"  # P, and U and V of one task
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"  # P alone


SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig, method="MULTITASK_PROMPT_TUNING"):
    """Fields of multitask prompt tuning, beside those of prompt tuning."""

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None  # a saved multitask prompt
    prompt_tuning_init_task: int | None = 0  # for EXACT_SOURCE_TASK
    num_ranks: Positive = 1
    num_tasks: Positive = 1


class MultitaskPromptEmbedding(Begun, config=MultitaskPromptTuningConfig):
    """Virtual tokens of all tasks, and for each task a matrix of low rank that scales them."""

    by_task = True
    before_decoder = True

    def __init__(self, config: Any, word_embeddings: Any):
        super().__init__(config, word_embeddings)
        tasks, ranks, tokens = config.num_tasks, config.num_ranks, self.embedding.num_embeddings
        self.num_tasks, self.num_ranks, self.token_dim = tasks, ranks, config.token_dim
        self.prefix_task_cols = nn.Parameter(torch.normal(0, 0.02, size=(tasks, tokens, ranks)))  # U
        self.prefix_task_rows = nn.Parameter(torch.normal(0, 0.02, size=(tasks, ranks, config.token_dim)))  # V
        if config.prompt_tuning_init in SOURCES and not config.inference_mode:
            self.load(self.source(config))

    def forward(self, indices: Tensor, task_ids: Tensor) -> Tensor:  # type: ignore[override]
        """Virtual tokens (batch, tokens, dim) for `task_ids` (batch,). Raises `BatchError` for unknown tasks."""
        if task_ids is None:
            raise BatchError("task_ids cannot be None")
        if task_ids.numel() and not 0 <= int(task_ids.min()) <= int(task_ids.max()) < self.num_tasks:
            raise BatchError(f"`task_ids` must be between 0 and {self.num_tasks - 1}, got {task_ids.tolist()}.")
        U, V = self.prefix_task_cols, self.prefix_task_rows
        return self.embedding(indices) * (U[task_ids] @ V[task_ids])

    def saved(self, indices: Tensor | None = None) -> dict[str, Tensor]:
        tasks = {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        return {**tasks, EMBEDDINGS: self.embedding.weight}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, mine in self.saved().items():
                mine.copy_(tensors.get(key, mine))

    def source(self, config: Any) -> dict[str, Tensor]:
        """What the prompt begins with, out of the one that is saved at `prompt_tuning_init_state_dict_path`."""
        how, path = config.prompt_tuning_init, config.prompt_tuning_init_state_dict_path
        if path is None:
            raise ConfigError(f"prompt_tuning_init='{how.value}' needs prompt_tuning_init_state_dict_path.")
        wanted = {EMBEDDINGS: self.embedding.weight} if how == "ONLY_SOURCE_SHARED" else self.saved()
        begin = {key: tensor for key, tensor in read_weights_file(Path(path)).items() if key in wanted}
        for key in begin.keys() - {EMBEDDINGS}:  # of all tasks
            tasks, task = len(begin[key]), config.prompt_tuning_init_task or 0
            if how == "EXACT_SOURCE_TASK" and not 0 <= task < tasks:
                raise ConfigError(f"prompt_tuning_init_task={task}, but '{path}' has {tasks} tasks.")
            begin[key] = begin[key][task, None] if how == "EXACT_SOURCE_TASK" else begin[key].mean(0, keepdim=True)
        check([Entry(key, key, wanted, key) for key in wanted], begin)
        return begin
