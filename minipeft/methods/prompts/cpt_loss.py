"""The loss of CPT: over the labels of the input and of the examples before it. Blau et al., 2024, section 3.

    loss = mean over labels y of -w log p(y)        w = 1, or with "decay" g^k, k: how many examples follow y's own

Types of token number the examples: the label of the first has type 4, that of the second 8, and so on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.errors import BatchError
from ...model.prompt import IGNORED


def _labels(types: Tensor) -> Tensor:
    return (types > 0) & (types % 4 == 0)


def joined_labels(labels: Tensor, types: Tensor | None, config: Any) -> tuple[Tensor, Tensor]:
    """Labels and types of the examples and the input (batch, tokens + length); what is no label is ignored.

    `types` are those of `labels` (batch, length); without them all of it are labels. Raises `BatchError` if the shapes
    differ.
    """
    types = torch.full_like(labels, 4) if types is None else types.to(labels.device)
    if types.shape != labels.shape:
        raise BatchError(f"`input_type_mask` must be of shape {tuple(labels.shape)}, got {tuple(types.shape)}.")
    before = torch.tensor([config.cpt_tokens_type_mask], device=labels.device)
    types = torch.where(types > 0, types + before.max(), types)  # another example, after all others
    types = torch.cat([before.expand(len(labels), -1), types.to(before.dtype)], dim=1)
    ids = torch.tensor([config.cpt_token_ids], device=labels.device)
    joined = torch.cat([ids.expand(len(labels), -1), labels], dim=1)
    return joined.masked_fill(~_labels(types), IGNORED), types


def label_loss(logits: Tensor, labels: Tensor, types: Tensor, config: Any) -> Tensor:
    """The loss for logits (batch, length, words), labels and their types (batch, length)."""
    logits, labels, types = logits[:, :-1], labels[:, 1:].to(logits.device), types[:, 1:].to(logits.device)
    counted = labels != IGNORED
    weight = counted.float()
    if config.opt_weighted_loss_type == "decay":
        for row, kinds in zip(weight, types):
            examples = kinds[_labels(kinds)].unique()  # ascending; the last one counts most
            for back, kind in enumerate(examples.flip(0)):
                row[kinds == kind] *= config.opt_loss_decay_factor**back
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return (loss.view_as(weight) * weight)[counted].mean()
