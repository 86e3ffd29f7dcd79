"""VB-LoRA's small checkpoint (`save_only_topk_weights`): of each piece's logits only which are the largest, and their
weights.

    logits (..., h)  ->  logits_topk_indices (..., topk), logits_topk_weights (..., topk - 1): they add up to 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BANK, LOGITS = "vblora_vector_bank", "vblora_logits_"
INDEX_DTYPES = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}  # and the bank sizes they are for


def index_dtype(config: Any) -> torch.dtype:
    """The smallest dtype that PEFT takes for an index into the bank."""
    return next((dtype for dtype, size in INDEX_DTYPES.items() if config.num_vectors < size), torch.int64)


def compressed(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors, from those of the layers."""
    saved = {}
    for key, tensor in tensors.items():
        if LOGITS in key:
            top, indices = tensor.topk(config.topk)
            saved[f"{key}_topk_indices"] = indices.to(index_dtype(config))
            saved[f"{key}_topk_weights"] = top.softmax(-1)[..., :-1].contiguous()
        else:
            saved[key] = tensor
    return saved


def expanded(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for the layers, from those of a checkpoint: logits that give the same weights, -inf elsewhere."""
    tensors = dict(tensors)
    for key in [key for key in tensors if key.endswith("_topk_indices")]:
        whole = key.removesuffix("_topk_indices")
        if (weights := tensors.pop(f"{whole}_topk_weights", None)) is not None:
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            logits = weights.new_full((*weights.shape[:-1], config.num_vectors), -torch.inf)
            tensors[whole] = logits.scatter(-1, tensors.pop(key).long(), weights.log())
    return tensors
