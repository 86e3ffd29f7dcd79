"""Base models in torch, built from the data in a case. For drivers that live in a torch process."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Conv1D(nn.Module):
    """A linear layer that keeps its weight as (in, out), as transformers' class of this name does."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


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


def make_layer(kind, args):
    if kind == "Conv1D":
        # An implementation that imports transformers knows only transformers' own class.
        other = sys.modules.get("transformers.pytorch_utils")
        return (other.Conv1D if other else Conv1D)(args["nf"], args["nx"])
    if kind in ("Experts", "Matrix"):
        return {"Experts": Experts, "Matrix": Matrix}[kind](**args)
    if kind == "MultiheadAttention":
        return nn.MultiheadAttention(batch_first=True, **args)
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    return getattr(nn, kind)(**args)


class Net(nn.Module):
    """Layers in order, under dotted names; looked up at every call, so they may be replaced."""

    def __init__(self, layers):
        super().__init__()
        self.order = [name for name, _, _ in layers]
        for name, kind, args in layers:
            parent = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, make_layer(kind, args))
        self.attention = {name for name, kind, _ in layers if kind == "MultiheadAttention"}

    def forward(self, x):
        for name in self.order:
            layer = self.get_submodule(name)
            x = layer(x, x, x)[0] if name in self.attention else layer(x)
        return x


class LMConfig(SimpleNamespace):
    """The fields of a transformers config that prompt learning looks at."""

    def to_dict(self):
        return dict(vars(self))

    def get(self, key, default=None):
        return getattr(self, key, default)

    def __contains__(self, key):
        return hasattr(self, key)


class Attention(nn.Module):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden))

    def forward(self, x, past=None):
        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        seen = 0
        if past is not None:
            seen = past[0].shape[2]
            k, v = torch.cat([past[0].to(k), k], 2), torch.cat([past[1].to(v), v], 2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(seen)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(hidden), Attention(hidden, heads)
        self.mlp = nn.Linear(hidden, hidden)

    def forward(self, x, past=None):
        x = x + self.attn(self.norm(x), past)
        return x + torch.tanh(self.mlp(x))


class CausalLM(nn.Module):
    """Embedding, pre-norm attention and a Tanh MLP per layer, head: the least that prompts can be joined to."""

    def __init__(self, vocab, hidden, heads, depth):
        super().__init__()
        self.config = LMConfig(vocab_size=vocab, hidden_size=hidden, num_attention_heads=heads,
                               num_hidden_layers=depth, model_type="tiny", is_encoder_decoder=False,
                               tie_word_embeddings=False)
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads) for _ in range(depth))
        self.head = nn.Linear(hidden, vocab, bias=False)

    @property
    def device(self):
        return self.head.weight.device

    @property
    def dtype(self):
        return self.head.weight.dtype

    def get_input_embeddings(self):
        return self.embed_tokens

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return kwargs

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, **unused):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for i, block in enumerate(self.layers):
            x = block(x, None if past_key_values is None else pair(past_key_values, i))
        return self.head(x)


def pair(past, i):
    """(keys, values) of layer i, out of transformers' cache classes or plain tuples."""
    if hasattr(past, "layers"):
        return past.layers[i].keys, past.layers[i].values
    if hasattr(past, "key_cache"):
        return past.key_cache[i], past.value_cache[i]
    return past[i][0], past[i][1]


def make(base):
    """The base model of a case's description, its weights yet to be set."""
    if base.get("model") == "causal_lm":
        return CausalLM(base["vocab"], base["hidden"], base["heads"], base["depth"])
    if base.get("model") == "skeleton":
        from .skeletons import make as make_skeleton

        return make_skeleton(base["name"])
    return Net(base["layers"])
