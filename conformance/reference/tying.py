"""Adapters on an embedding whose weight is the head's, too, where the config says `ensure_weight_tying`."""

from __future__ import annotations

import numpy as np

from .method import KEY

EMBEDDING, HEAD = f"{KEY}embed_tokens.", f"{KEY}head."
TOKENS = "token_adapter.trainable_tokens_delta"
# what the embedding has -> what the head has, and whether that is transposed
PAIRS = {"lora_embedding_A": ("lora_B.weight", True), "lora_embedding_B": ("lora_A.weight", True),
         "weight": ("weight", False), TOKENS: (TOKENS, False)}


def shapes(weights: dict, config: dict) -> dict:
    """Saved key -> shape of what is trained whole, and of tokens."""
    found: dict = {}
    if "embed_tokens" in (config.get("modules_to_save") or ()):
        found |= dict.fromkeys((f"{EMBEDDING}weight", f"{HEAD}weight"), weights["embed_tokens.weight"].shape)
    if chosen := config.get("trainable_token_indices"):
        found[EMBEDDING + TOKENS] = (len(chosen), weights["embed_tokens.weight"].shape[1])
    return found


def both(tensors: dict) -> dict:
    """The tensors, those of the head being the embedding's."""
    found = dict(tensors)
    for ours, (theirs, turned) in PAIRS.items():
        if EMBEDDING + ours in tensors:
            value = np.asarray(tensors[EMBEDDING + ours])
            found[HEAD + theirs] = value.T if turned else value
    return found


def summed(gradients: dict) -> dict:
    """The gradients, each of the two that are tied having that of both."""
    found = dict(gradients)
    for ours, (theirs, turned) in PAIRS.items():
        if EMBEDDING + ours in gradients and HEAD + theirs in gradients:
            other = np.asarray(gradients[HEAD + theirs])
            found[EMBEDDING + ours] = gradients[EMBEDDING + ours] + (other.T if turned else other)
    return both(found)
