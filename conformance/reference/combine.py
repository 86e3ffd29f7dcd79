"""One LoRA adapter of several, PEFT's `add_weighted_adapter`: TIES, https://arxiv.org/abs/2306.01708, among others.

`dare_*` prunes at random, which is left out.
"""

from __future__ import annotations

import numpy as np


def pruned(a, density):
    """The entries of largest size, that share of them; the others are 0."""
    kept = np.argsort(-np.abs(a), axis=None, kind="stable")[: int(density * a.size)]
    found = np.zeros(a.size)
    found[kept] = a.reshape(-1)[kept]
    return found.reshape(a.shape)


def ties(parts, weights, majority="total"):
    """The weighted mean over the parts that have the sign of the majority, for each entry."""
    parts = np.stack(parts)
    votes = (parts if majority == "total" else np.sign(parts)).sum(0)
    agree = np.sign(parts) == np.where(votes >= 0, 1, -1)
    weights = np.reshape(weights, (-1, *[1] * (parts.ndim - 1)))
    return (agree * weights * parts).sum(0) / np.maximum(agree.sum(0), 1)


def task_arithmetic(parts, weights, density=1.0, kind="linear", majority="total"):
    if kind in ("ties", "magnitude_prune"):
        parts = [pruned(p, density) for p in parts]
    return ties(parts, weights, majority) if kind == "ties" else sum(w * p for w, p in zip(weights, parts))


def combined(factors, weights, combination_type="svd", svd_rank=None, density=1.0, majority_sign_method="total"):
    """(A, B) of the new adapter, whose scale is 1; `factors`: (A, B, scale) of each.

    With a density of 1, `dare_*` prunes nothing and is what it is without.
    """
    combination_type = combination_type.removeprefix("dare_")
    As, Bs, scales = zip(*factors)
    scaled = [w * s for w, s in zip(weights, scales)]
    if combination_type == "cat":
        return np.concatenate([w * a for w, a in zip(scaled, As)]), np.concatenate(Bs, 1)
    kind = "linear" if combination_type == "svd" else combination_type.removesuffix("_svd")
    how = {"density": density, "kind": kind, "majority": majority_sign_method}
    if not combination_type.endswith("svd"):  # of each factor, the weight being shared by both
        size = np.sqrt(np.abs(scaled))
        return task_arithmetic(As, size * np.where(np.less(scaled, 0), -1, 1), **how), task_arithmetic(Bs, size, **how)
    flat = [s * b.reshape(len(b), -1) @ a.reshape(len(a), -1) for a, b, s in factors]
    U, S, V = np.linalg.svd(task_arithmetic(flat, weights, **how), full_matrices=False)
    rank = svd_rank or max(len(a) for a in As)
    A, B = V[:rank], U[:, :rank] * S[:rank]
    return A.reshape(-1, *As[0].shape[1:]), B.reshape(*B.shape, *Bs[0].shape[2:])
