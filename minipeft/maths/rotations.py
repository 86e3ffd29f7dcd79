"""Orthogonal matrices, out of skew-symmetric ones and out of columns, and dropout of blocks of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def skew(above: Tensor, size: int, places: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Skew-symmetric matrices (..., n, n), n = `size`, with the numbers `above` (..., n (n - 1) / 2) over the diagonal.

    They are counted row by row; `places` are their rows and columns, where the caller keeps those.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=above.device) if places is None else places
    flat = above.reshape(-1, above.shape[-1])
    at = torch.arange(len(flat), device=above.device)[:, None], rows, columns  # the latter two are kept for gradients
    Q = above.new_zeros(len(flat), size, size).index_put(at, flat).view(*above.shape[:-1], size, size)
    return Q - Q.mT


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 for skew-symmetric Q (..., n, n), in at least float32: there is no solver below."""
    Q = Q.to(torch.promote_types(Q.dtype, torch.float32))
    I = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(I + Q, I - Q, left=False)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """(I + Q) (I - Q)^-1 as a series: I + 2 Q + ... + 2 Q^(t - 2) + Q^(t - 1), t terms; two are I + 2 Q, as in PEFT."""
    I = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if terms < 3:
        return I + 2 * Q if terms == 2 else I.expand_as(Q)
    R = 2 * (I + Q) + Q @ Q  # not 2 I + Q (2 I + Q): gradients would keep that factor, too
    for _ in range(terms - 3):
        R = 2 * I + Q @ R
    return R - I


def orthonormal(U: Tensor) -> Tensor:
    """The columns of U (n, r) made orthonormal, first to last (Gram-Schmidt)."""
    V: list[Tensor] = []
    for u in U.unbind(1):
        for v in V:
            u = u - (v @ u) * v
        V.append(u / u.norm())
    return torch.stack(V, 1)


def from_orthonormal(A: Tensor) -> Tensor:
    """|A A^T - I| in the Frobenius norm: how far the rows of A (r, n) are from being orthonormal."""
    return torch.linalg.norm(A @ A.mT - torch.eye(len(A), dtype=A.dtype, device=A.device))


class BlockDropout(nn.Module):
    """While training, a share p of the blocks (r, b, b), chosen at random, becomes I. A single block stays."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, R: Tensor) -> Tensor:
        if not self.training or len(R) == 1:
            return R
        return replaced(R, torch.randperm(len(R), device=R.device) < int(self.p * len(R)))


class FactorDropout(BlockDropout):
    """While training, a share p of the blocks (m, d, b, b) of one factor, all chosen at random, becomes I."""

    def forward(self, R: Tensor) -> Tensor:
        if not self.training:
            return R
        m, d = R.shape[:2]
        factor = int(torch.randint(0, m, (1,)))
        chosen = torch.zeros(m, d, dtype=torch.bool, device=R.device)
        chosen[factor] = (torch.randperm(d) < int(self.p * d)).to(R.device)
        return replaced(R, chosen)


def replaced(R: Tensor, chosen: Tensor) -> Tensor:
    """Blocks (..., b, b), with I in the place of those that are `chosen` (...)."""
    return torch.where(chosen[..., None, None], torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), R)
