"""How AdaMSS sorts the rows of a weight into subspaces: k-means on the left singular vectors.

Which row is in which subspace is not saved, so it must come out the same wherever an adapter is loaded: the same as
scikit-learn's `KMeans(k, init="random", n_init=1, max_iter=10, random_state=123456789)` gives, which PEFT calls.
Weights in another precision, or a device with other random numbers, may be sorted otherwise. The sizes of the
subspaces hardly ever agree then, and a checkpoint of other sizes is refused.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...maths.svd import leading

FIRST_ROWS, ITERATIONS = 123456789, 10  # the seed that picks the rows to start from
CHUNK = 256  # rows multiplied at once, which may decide a tie


def principal(W: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """(U (out, r), V^T (r, in)) of the r largest singular values of W (out, in), in float32; r at most min(out, in)."""
    U, _, Vt = leading(W, r, niter=2, seed=seed)
    return U, Vt.contiguous()


def subspaces(U: Tensor, k: int) -> list[Tensor]:
    """The numbers of the rows in each of at most k clusters of the rows of U (n, r)."""
    k = min(k, len(U))
    labels = k_means(U.detach().cpu().numpy(), k)
    found = [torch.from_numpy(np.flatnonzero(labels == i)).to(U.device) for i in range(k)]
    return [rows for rows in found if len(rows)]


def k_means(X: np.ndarray, k: int) -> np.ndarray:
    """The cluster of each row of X (n, d): Lloyd's algorithm, which starts from k of the rows."""
    X = X - X.mean(0)
    n = len(X)
    uniform = np.full(n, 1 / n, X.dtype)  # given, because `choice` draws in another way without
    centres = X[np.random.RandomState(FIRST_ROWS).choice(n, k, replace=False, p=uniform)]  # (k, d)
    still = 1e-4 * X.var(0).mean()
    labels = np.full(n, -1)
    for _ in range(ITERATIONS):
        before, labels = labels, nearest(X, centres)
        if np.array_equal(labels, before):
            return labels
        old, centres = centres, means(X, labels, centres)
        if ((centres - old) ** 2).sum() <= still:
            break
    return nearest(X, centres)


def nearest(X: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The number of the centre that is nearest to each row of X."""
    products = np.concatenate([X[i : i + CHUNK] @ centres.T for i in range(0, len(X), CHUNK)])
    return (np.einsum("ij,ij->i", centres, centres) - 2 * products).argmin(1)


def means(X: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The mean of each cluster. One without rows takes the row that is farthest from its centre."""
    sums, counts = np.zeros_like(centres), np.bincount(labels, minlength=len(centres))
    np.add.at(sums, labels, X)
    empty = np.flatnonzero(counts == 0)
    away = ((X - centres[labels]) ** 2).sum(1)
    if len(empty) and away.max() > 0:
        for cluster, row in zip(empty, np.argpartition(away, -len(empty))[: -len(empty) - 1 : -1]):
            sums[labels[row]] -= X[row]
            counts[labels[row]] -= 1
            sums[cluster], counts[cluster] = X[row], 1
    sums *= (1 / np.maximum(counts, 1)).astype(X.dtype)[:, None]
    sums[counts == 0] = sums[counts.argmax()]
    return sums
