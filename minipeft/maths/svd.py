"""Singular value decompositions of frozen weights."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def leading(W: Tensor, r: int, niter: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) and V^T (r, in) of the r largest singular values of W (out, in), in float32.

    With `niter` by that many steps of a randomised decomposition; its random numbers come from `seed` and leave torch's
    generators as they were. PEFT: float32 for all weights, which also settles the signs of the singular vectors.
    """
    W = W.detach().to(torch.float32)
    if niter is None:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W, q=min(r, *W.shape), niter=niter)
        Vt = V.t()
    return U[:, :r], S[:r], Vt[:r]
