"""Multitask prompt tuning - Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning.
Wang et al., 2023, https://arxiv.org/abs/2303.02861, section 3.2.

    model([P_k, e(x)])          P_k = P * (U_k V_k) for task k
    P: (tokens, dim) of all tasks, U: (tasks, tokens, ranks), V: (tasks, ranks, dim)
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import read_weights_file
from ..errors import BatchError, CheckpointError, ConfigError
from ..prompt import EMBEDDINGS
from .prompt_tuning import PromptEmbedding, PromptTuningConfig


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
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_ranks", "num_tasks"):
            if getattr(self, name) is None:
                raise ConfigError(f"`{name}` should be a positive integer value but the value passed is None.")
        self.require_positive("num_ranks", "num_tasks")

    @classmethod
    def _inits(cls) -> type[enum.Enum]:
        return MultitaskPromptTuningInit


class MultitaskPromptEmbedding(PromptEmbedding, config=MultitaskPromptTuningConfig):
    """Virtual tokens of all tasks, and for each task a matrix of low rank that scales them."""

    by_task = True
    before_decoder = True

    def __init__(self, config: Any, word_embeddings: Any):
        super().__init__(config, word_embeddings)
        total = self.embedding.num_embeddings
        self.num_tasks, self.num_ranks, self.token_dim = config.num_tasks, config.num_ranks, config.token_dim
        cols, rows = (config.num_tasks, total, config.num_ranks), (config.num_tasks, config.num_ranks, config.token_dim)
        self.prefix_task_cols = nn.Parameter(torch.normal(0, 0.02, size=cols))  # (tasks, tokens, ranks)
        self.prefix_task_rows = nn.Parameter(torch.normal(0, 0.02, size=rows))  # (tasks, ranks, dim)
        if config.prompt_tuning_init in SOURCES and not config.inference_mode:
            self._start_from_source(config)

    def _start_from_source(self, config: Any) -> None:
        how, path = config.prompt_tuning_init, config.prompt_tuning_init_state_dict_path
        if path is None:
            raise ConfigError(f"prompt_tuning_init='{how.value}' needs prompt_tuning_init_state_dict_path.")
        source = read_weights_file(Path(path))
        wanted = {EMBEDDINGS: self.embedding.weight}
        if how != "ONLY_SOURCE_SHARED":
            wanted |= {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        start = {}
        for key, mine in wanted.items():
            if key not in source:
                raise CheckpointError(f"'{path}' is no multitask prompt: it has no '{key}' but {sorted(source)}.")
            value, task = source[key], config.prompt_tuning_init_task or 0
            if key != EMBEDDINGS and how == "EXACT_SOURCE_TASK":
                if not 0 <= task < len(value):
                    raise ConfigError(f"prompt_tuning_init_task={task}, but '{path}' has {len(value)} tasks.")
                value = value[task : task + 1]
            elif key != EMBEDDINGS:
                value = value.mean(0, keepdim=True)
            if value.shape != mine.shape:
                raise ConfigError(f"{key} of '{path}' is {tuple(value.shape)}, the prompt needs {tuple(mine.shape)}.")
            start[key] = value
        self._take(start)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        own = {EMBEDDINGS: self.embedding.weight, "prefix_task_cols": self.prefix_task_cols}
        own["prefix_task_rows"] = self.prefix_task_rows
        with torch.no_grad():
            for key, value in tensors.items():
                own[key].copy_(value)

    def forward(self, indices: Tensor, task_ids: Tensor) -> Tensor:  # type: ignore[override]
        """Virtual tokens (batch, tokens, dim) for `task_ids` (batch,). Raises `BatchError` for unknown tasks."""
        if task_ids is None:
            raise BatchError("task_ids cannot be None")
        if task_ids.numel() and not 0 <= int(task_ids.min()) <= int(task_ids.max()) < self.num_tasks:
            raise BatchError(f"`task_ids` must be between 0 and {self.num_tasks - 1}, got {task_ids.tolist()}.")
        scale = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        return self.embedding(indices) * scale

    def saved(self, indices: Tensor) -> dict[str, Tensor]:
        tasks = {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        return {**tasks, EMBEDDINGS: self.embedding.weight}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._take({key: tensors[key] for key in (EMBEDDINGS, "prefix_task_cols", "prefix_task_rows")})
