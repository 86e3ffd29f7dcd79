"""Principal components of vectors that come batch by batch, as Ross et al., 2008, find them for visual tracking.

    X_t = [S V; X - mean(X); sqrt(n m / (n + m)) (mean_old - mean(X))]       n vectors before, m in the batch X (m, in)
    U S V = the k largest singular values of X_t and their vectors           S: (k,), V: (k, in)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 42  # of the randomised decomposition


class IncrementalPCA:
    """The first k components: V (k, in), largest share of the variance first, and S (k,); None before a batch."""

    V: Tensor | None = None
    S: Tensor
    share: Tensor  # of the variance, by component (k,)
    mean: Tensor
    variance: Tensor

    def __init__(self, k: int, tau: float):
        self.k, self.tau, self.count = k, tau, 0
        self.converged = torch.zeros(k, dtype=torch.bool)  # components that the last batch turned by less than acos tau

    def update(self, X: Tensor) -> None:
        """Take a batch X (m, in) in, with m >= k."""
        m, old = len(X), self.V
        n, total = self.count, self.count + m
        mean, wide = X.mean(0), X.double()
        square = (wide - wide.mean(0)).square().sum(0)  # (in,)
        if old is None:
            self.mean = wide.mean(0)
            X = X - self.mean.to(X.dtype)
        else:
            turned = (n * m / total) ** 0.5 * (self.mean - mean)  # float64, in which PEFT goes on, too
            X = torch.vstack([(self.S[:, None] * old).double(), (X - mean).double(), turned])
            square += self.variance * n + n * m / total * (self.mean - wide.mean(0)).square()
            self.mean = (self.mean * n + wide.sum(0)) / total
        self.variance, self.count = square / total, total
        with torch.random.fork_rng(devices=[X.device] if X.is_cuda else []):
            torch.manual_seed(SEED)
            _, S, V = torch.svd_lowrank(X, q=min(2 * self.k, *X.shape), niter=4)
        V = V.T * V.T.gather(1, V.T.abs().argmax(1, keepdim=True)).sign()  # the largest entry of each is positive
        self.share = (S.square() / square.sum())[: self.k]
        self.V, self.S = V[: self.k], S[: self.k]
        if old is not None:
            self.converged = F.cosine_similarity(self.V, old) >= self.tau
