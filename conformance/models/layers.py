"""Layers of base models that torch itself does not have."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


class Conv1D(nn.Module):
    """A linear layer that keeps its weight as (in, out), as transformers' class of this name does."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def conv1d() -> Any:
    """The class that stands for Conv1D: an implementation that imports transformers knows only transformers' own."""
    other = sys.modules.get("transformers.pytorch_utils")
    return other.Conv1D if other else Conv1D


class Experts(nn.Module):
    """y = mean over experts e of W_e x, with the bare parameter `weight` of shape (experts, out, in).

    `is_transposed`, an attribute that PEFT reads, says that the shape is (experts, in, out).
    """

    def __init__(self, shape, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.empty(*shape))

    def forward(self, x):
        axes = "eio" if self.is_transposed else "eoi"
        return torch.einsum(f"...i,{axes}->...eo", x, self.weight).mean(-2)


class Matrix(nn.Module):
    """y = W x with the bare parameter `weight` of shape (out, in), in no nn.Linear."""

    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))

    def forward(self, x):
        return x @ self.weight.T


class Pair(nn.Module):
    """y = W_down tanh(W_up x), both bare parameters of one module, as experts have them. `shape`: of W_up."""

    def __init__(self, shape):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(*shape)), nn.Parameter(torch.empty(*shape[::-1]))

    def forward(self, x):
        return torch.tanh(x @ self.up.T) @ self.down.T


class Centred(nn.Module):
    """y = w * (x - centre), `centre` being a buffer, as running means are."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features))
        self.register_buffer("centre", torch.empty(features))

    def forward(self, x):
        return self.weight * (x - self.centre)


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies what it looks up, as those of Gemma do; PEFT reads `embed_scale`."""

    def __init__(self, num_embeddings, embedding_dim, embed_scale):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, x):
        return super().forward(x) * self.embed_scale


def make_layer(kind, args):
    if "embed_scale" in args:
        return ScaledEmbedding(**args)
    if kind == "Conv1D":
        return conv1d()(args["nf"], args["nx"])
    if own := {"Experts": Experts, "Matrix": Matrix, "Pair": Pair, "Centred": Centred}.get(kind):
        return own(**args)
    if kind == "MultiheadAttention":
        return nn.MultiheadAttention(batch_first=True, **args)
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    return getattr(nn, kind)(**args)
