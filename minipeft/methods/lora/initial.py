"""How LoRA's factors start: `init_lora_weights`.

    True         A uniform (Kaiming), B = 0             False        A and B uniform
    "gaussian"   A normal, std 1 / r, B = 0             "orthogonal" A and B from one random orthogonal matrix
    "pissa"      B A = the r largest singular values of W; "pissa_niter_16" by 16 steps of a randomised SVD
                 Meng et al., 2024, https://arxiv.org/abs/2404.02948
    "olora"      B A = the first r columns of a QR decomposition of W
                 Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775
    "eva"        B = 0, until `initialize_lora_eva_weights` gives A: eva.py
    "lora_ga"    A and B from the gradient that `preprocess_loraga` saw: gradient.py
    "corda"      A and B from the inputs that `preprocess_corda` saw: corda.py
    "loftq"      B A makes up for quantising W: loftq.py

    "mica"       A = 0, B = the left singular vectors of the r smallest singular values of W, which stay as they are
                 MiCA, https://arxiv.org/abs/2604.01694

PiSSA, OLoRA, LoRA-GA and CorDA take s B A out of the frozen weight, so that the model starts unchanged.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ...core import registry
from ...core.errors import ConfigError, MergeError

OWN_FILES = ("loftq", "lora_ga", "corda")
INITS = re.compile(rf"gaussian|orthogonal|pissa|pissa_niter_\d+|olora|eva|mica|{'|'.join(OWN_FILES)}")


def changes_base(how: bool | str) -> bool:
    """Whether that start writes to the frozen weights."""
    return isinstance(how, str) and how.startswith(("pissa", "olora", *OWN_FILES))


@torch.no_grad()
def initialise(adapter: Any, how: bool | str) -> None:
    """Set A and B of a freshly built LoRA or DoRA adapter; torch's own initial values are in them."""
    A, B, base = adapter.lora_A, adapter.lora_B, adapter.base
    if how is False:
        return
    if how is True or (not base.reads_vectors and how != "mica"):  # PEFT: any other name means True on an embedding
        base.reset_factors(A, B)
    elif how == "gaussian":
        nn.init.normal_(A.weight, std=1 / adapter.r)
        for zero in B.parameters():
            nn.init.zeros_(zero)
    elif how == "eva":
        nn.init.zeros_(B.weight)
    elif how == "orthogonal":
        a, b = orthogonal(base.in_features, base.out_features, A.weight.shape[0])
        A.weight.data, B.weight.data = a, b
    elif isinstance(how, str):
        if not base.pointwise:
            raise ConfigError(f"init_lora_weights={how!r} is for linear layers, but '{adapter.path}' is {base.label}.")
        W = base.read()[0].detach()
        if W.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ConfigError(f"init_lora_weights={how!r} needs a float32, float16 or bfloat16 weight, got {W.dtype}.")
        if (found := factors(adapter, W.float(), how)) is None:
            return initialise(adapter, True)
        a, b, rest = found
        for factor, value in ((A, a), (B, b)):
            getattr(factor, "weight", factor).data = value
        if changes_base(how):
            leave(adapter, rest.to(W.dtype))


def leave(adapter: Any, W: Tensor) -> None:
    """Let W (out, in) be what is in the frozen layer, once the adapter is accepted: `adapter.residual` till then."""
    check_unmerged(adapter)
    adapter.base.check_writes(W)
    if adapter.residual is None:
        adapter.on_commit(lambda: settle(adapter))
    adapter.residual = W


def settle(adapter: Any) -> None:
    """Make what the adapter leaves the frozen weight."""
    replace(adapter.base, adapter.residual)
    adapter.residual = None


def replace(base: Any, W: Tensor) -> None:
    """Make W (out, in) the frozen weight, for good."""
    base.write(W, None)
    base.forget()


def check_unmerged(adapter: Any) -> None:
    """Raise `MergeError` where a merge is on, which could not be undone once the frozen weight is another."""
    if adapter.base.changed:
        raise MergeError(f"{adapter} changes the frozen weight, in which an adapter is merged. Unmerge that first.")


def factors(adapter: Any, W: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """A (r, in), B (out, r) and what is left in the frozen layer, for its weight W (out, in); None: start as usual."""
    if how in OWN_FILES:
        return registry.load_start("LORA", how).start(adapter, W)
    if how == "mica":
        return *minor(W, adapter), W
    a, b = olora(W, adapter.r) if how == "olora" else pissa(W, adapter.r, adapter.scaling, how)
    return a, b, W - adapter.scaling * b @ a


def orthogonal(n_in: int, n_out: int, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with B A = 0: the even and the odd rows of one orthogonal (r, r) matrix."""
    if r % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = (torch.randn(n_in, r // 2) @ Q[0::2]).T / 10.0  # (r, in)
    B = (torch.randn(r // 2, n_out).T @ Q[1::2]) / 10.0  # (out, r)
    return A.contiguous(), B.contiguous()


def pissa(W: Tensor, r: int, s: float, how: str) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s B A the closest rank-r matrix to W (out, in)."""
    if how == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=int(how.rpartition("_")[2]))
        Vh = V.T
    root = torch.sqrt(S[:r] / s)  # (r,)
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with B A the part of W = Q R that its first r orthogonal columns carry."""
    Q, R = torch.linalg.qr(W)
    return R[:r].contiguous(), Q[:, :r].contiguous()


def minor(W: Tensor, adapter: Any) -> tuple[Tensor, Tensor]:
    """A = 0 (r, in) and B (out, r), what W (out, in) has the least of in its output."""
    r = adapter.r
    if r > min(W.shape):
        raise ConfigError(f"The rank of MiCA may not exceed either of {tuple(W.shape)}, got {r}.")
    U = torch.linalg.svd(W, full_matrices=False)[0]
    return W.new_zeros(r, W.shape[1]), U[:, -r:].contiguous()


def to_plain(config: Any, tensors: dict[str, Tensor], initial: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A LoRA of twice the rank that adds s (B A - B0 A0): what training changed, for the unchanged base model.

    `initial` are the tensors of the untrained adapter, under the same keys. Returns its configuration and tensors.
    """
    if config.init_lora_weights == "loftq":
        raise ConfigError("LoftQ also rounded the base weights, which no LoRA on the unchanged model can make good.")
    if config.use_dora or (config.use_rslora and (config.rank_pattern or config.alpha_pattern)):
        raise ConfigError("A PiSSA or OLoRA adapter with DoRA, or rsLoRA and patterns, cannot be made a plain LoRA.")
    if tensors.keys() != initial.keys():
        raise ConfigError(f"The initial adapter has other tensors: {sorted(tensors.keys() ^ initial.keys())[:5]}.")
    plain = {}
    for key, tensor in tensors.items():
        start = initial[key].to(tensor)
        if re.search(r"\.lora_(embedding_)?A(\.|$)", key):
            tensor = torch.cat([tensor, start], 0)  # (2 r, in)
        elif re.search(r"\.lora_(embedding_)?B(\.weight$|$)", key):
            tensor = torch.cat([tensor, -start], 1)  # (out, 2 r)
        plain[key] = tensor
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: 2 * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    return config, plain
