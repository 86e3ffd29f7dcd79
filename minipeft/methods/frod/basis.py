"""The fixed matrices of FRoD: V, made from the weights of several layers; U, and where S has entries.

    [W_1; ...; W_n] = [Q_1; ...; Q_n] R        the weights above each other, W_i: (out_i, in), decomposed by Q R
    V = R^T E                                  E: (in, in), the eigenvectors of sum_i (Q_i^T Q_i + alpha I)^-1 / n

With fewer rows than columns there is no such R, and V has the right singular vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.bases import Base
from ...core.errors import ConfigError
from ...core.tuner import progress_bar

SHARED = ("frod_V", "frod_s_indices", "frod_s_size")


def role(path: str) -> str:
    """What a layer does in its block, by its path: "layers.3.self_attn.q_proj" is a "self_attn_q_proj"."""
    parts = path.split(".")[-3:]
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    return "attention_output" if parts == ["attention", "output", "dense"] else "_".join(parts[-2:])


def block(path: str, otherwise: int) -> int:
    """The number of the block that a layer stands in; `otherwise` if its path has none."""
    parts = path.split(".")
    first = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*first, *parts) if part.isdigit()), otherwise)


def basis(weights: list[Tensor], alpha: float) -> Tensor:
    """V (in, in) for weights (out, in), in float32. Raises `ConfigError` when they cannot be decomposed."""
    if any(W.is_meta for W in weights):
        return torch.empty(weights[0].shape[1], weights[0].shape[1], device="meta")
    W = torch.cat([W.to("cpu", torch.float32) for W in weights])
    try:
        if W.shape[0] < W.shape[1]:
            return torch.linalg.svd(W)[2].t()
        Q, R = torch.linalg.qr(W)
        ridge = alpha * torch.eye(len(R))
        parts = Q.split([len(W) for W in weights])
        T = torch.stack([torch.linalg.inv(q.t() @ q + ridge) for q in parts]).sum(0) / len(parts)
        return R.t() @ torch.linalg.eigh(T)[1]
    except RuntimeError as error:
        raise ConfigError(f"FRoD cannot decompose the weights; raise `regularization_alpha`. {error}") from error


def split(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """U (out, in) and l (in,): the directions and lengths of the columns of W V^-T. W: (out, in), V: (in, in)."""
    if W.is_meta or V.is_meta:
        return torch.empty_like(W, device="meta"), torch.empty_like(W[0], device="meta")
    w, v = W.to("cpu", torch.float64), V.to(W.dtype).to("cpu", torch.float64)
    try:
        B = torch.linalg.solve(v, w.t()).t()
    except RuntimeError:  # V is singular
        B = w @ torch.linalg.pinv(v, rtol=1e-6).t()
    l = torch.linalg.norm(B, dim=0)
    U = torch.where(l > 1e-12, B / l, torch.zeros_like(B))
    return U.float().to(W), l.float().to(W)


def positions(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """Rows and columns (2, k) of random entries of a matrix (n, n), none of them on the diagonal."""
    k = min(max(int(n * n * rate), rate > 0), n * n - n)
    if not k:
        return torch.empty(2, 0, dtype=torch.long)
    place = torch.randperm(n * n - n, generator=generator)[:k]
    row, column = place // (n - 1), place % (n - 1)  # counted as if the diagonal were not there
    return torch.stack([row, column + (column >= row)])


def shared_by_group(config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
    """V, the positions in S and the size of S for each group of layers; an earlier adapter's, if there is one."""
    groups: dict[str, dict[int, Tensor]] = {}
    for count, (path, base) in enumerate(found):
        # PEFT: of several layers of a group in one block only the last counts
        groups.setdefault(role(path), {})[block(path, count)] = base.read()[0].detach()
        earlier = existing(f"frod_V.{role(path)}") or groups[role(path)]
        if any(V.shape[1] != base.in_features for V in earlier.values()):
            raise ConfigError(f"'{path}' has {base.in_features} inputs, unlike other layers that share V with it.")
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    shared: dict[str, Tensor] = {}
    for name in progress_bar(sorted(groups), "FRoD: decomposing weights", config.progressbar):
        W = next(iter(groups[name].values()))
        place = positions(W.shape[1], config.sparse_rate, generator).to(W.device)
        if box := existing(f"frod_V.{name}"):  # PEFT: adapters start with one V, whatever their `regularization_alpha`
            V = next(iter(box.values()))
            other = next(iter(existing(f"frod_s_indices.{name}").values()))
            place = other if other.shape == place.shape else place
        else:
            V = basis([W for _, W in sorted(groups[name].items())], config.regularization_alpha).to(W)
        size = torch.tensor([len(V), len(V)], device=W.device)
        shared |= {f"{slot}.{name}": tensor for slot, tensor in zip(SHARED, (V, place, size))}
    return shared
