"""The base models in NumPy float64: an independent second implementation, which the formulas are run on.

A `Site` is one weight that an adapter can sit on, in one layout for all kinds: W is (out, in, *kernel), for Experts
(experts, out, in). What is stored as (in, out) - Embedding, Conv1D, transposed Experts - is turned here, so formulas
need to know one layout only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def flipped(kind, args):
    return kind in ("Embedding", "Conv1D") or args.get("is_transposed", False)


@dataclass
class Site:
    path: str  # in adapter keys: base_model.model.<path>.<slot>
    kind: str
    W: np.ndarray  # (out, in, *kernel)
    b: np.ndarray | None
    weight: str  # the base parameter's name
    bias: str
    args: dict = field(default_factory=dict)

    @property
    def out(self):
        return self.W.shape[0]

    @property
    def inp(self):
        """Input channels in all, over all groups of a convolution."""
        return self.W.shape[1] * self.args.get("groups", 1)

    @property
    def kernel(self):
        return self.W.shape[2:]


def layers_of(base):
    return base.get("layers", [])


def sites(base, weights):
    """Every adaptable weight of a base model, by its path."""
    found = {}

    def put(path, kind, weight, bias, args):
        W = np.asarray(weights[weight], np.float64)
        b = weights.get(bias)
        if flipped(kind, args):
            W = W.swapaxes(-1, -2)
        found[path] = Site(path, kind, W, None if b is None else np.asarray(b, np.float64), weight, bias, args)

    if base.get("model") == "causal_lm":
        for name in weights:
            if name.endswith(".weight"):
                path = name[: -len(".weight")]
                kind = "Embedding" if path == "embed_tokens" else "LayerNorm" if path.endswith("norm") else "Linear"
                put(path, kind, name, path + ".bias", {})
    for name, kind, args in layers_of(base):
        if kind == "MultiheadAttention":
            put(name, "Linear", f"{name}.in_proj_weight", f"{name}.in_proj_bias", args)
            put(f"{name}.base_layer.out_proj", "Linear", f"{name}.out_proj.weight", f"{name}.out_proj.bias", args)
        elif kind != "Tanh":
            put(name, kind, f"{name}.weight", f"{name}.bias", args)
    return found


def stored(site, W):
    """W back in the layout that the base model stores."""
    return W.swapaxes(-1, -2) if flipped(site.kind, site.args) else W


def tuple_of(v, d):
    return tuple(v) if isinstance(v, (list, tuple)) else (v,) * d


def conv(x, W, b, args):
    """Cross-correlation in any number of dimensions. x: (batch, in, *space), W: (out, in / groups, *kernel)."""
    d, k = W.ndim - 2, W.shape[2:]
    pad, step, gap = (tuple_of(args.get(n, v), d) for n, v in (("padding", 0), ("stride", 1), ("dilation", 1)))
    groups = args.get("groups", 1)
    x = np.pad(x, [(0, 0), (0, 0), *[(p, p) for p in pad]])
    size = [(x.shape[2 + i] - gap[i] * (k[i] - 1) - 1) // step[i] + 1 for i in range(d)]
    y = np.zeros((x.shape[0], W.shape[0], *size))
    n_out, n_in = W.shape[0] // groups, W.shape[1]
    for at in np.ndindex(*k):
        window = tuple(slice(at[i] * gap[i], at[i] * gap[i] + (size[i] - 1) * step[i] + 1, step[i]) for i in range(d))
        where = (slice(None), slice(None), *window)
        part = x[where]
        for g in range(groups):
            o, i = slice(g * n_out, (g + 1) * n_out), slice(g * n_in, (g + 1) * n_in)
            weight = (o, slice(None), *at)
            y[:, o] += np.einsum("oi,bi...->bo...", W[weight], part[:, i])
    return y if b is None else y + b.reshape(1, -1, *[1] * d)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q, k, v, heads, causal_from=None):
    """q: (batch, n, dim), k and v: (batch, m, dim) or already split (batch, heads, m, dim / heads)."""
    def split(t):
        return t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3) if t.ndim == 3 else t

    q, k, v = split(q), split(k), split(v)
    score = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal_from is not None:
        seen = np.tril(np.ones(score.shape[-2:], bool), causal_from)
        score = np.where(seen, score, -np.inf)
    return (softmax(score) @ v).transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def norm(x, W, b, eps=1e-5):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * W + (0 if b is None else b)


def affine(x, W, b):
    return x @ W.T if b is None else x @ W.T + b


def apply_layer(site, x, W=None, b=None):
    """One layer's output; W and b default to the site's own."""
    W, b = (site.W, site.b) if W is None else (W, b)
    if site.kind == "Embedding":
        return W.T[x]
    if site.kind.startswith("Conv") and site.kind != "Conv1D":
        return conv(x, W, b, site.args)
    if site.kind == "LayerNorm":
        return norm(x, W, b)
    if site.kind == "Experts":
        return np.einsum("...i,eoi->...eo", x, W).mean(-2)
    return affine(x, W, b)


def run(base, weights, inputs, special=None, prompt=None):
    """The model's output. `special`: path -> function(site, x) in place of a layer. `prompt`: see `run_lm`."""
    at, special = sites(base, weights), special or {}
    if base.get("model") == "causal_lm":
        return run_lm(base, weights, inputs["input_ids"], special, prompt or {})
    x = inputs["x"]
    for name, kind, args in base["layers"]:
        if kind == "Tanh":
            x = np.tanh(x)
        elif kind == "MultiheadAttention":
            into, out = at[name], at[f"{name}.base_layer.out_proj"]
            q, k, v = np.split(affine(x, into.W, into.b), 3, -1)
            x = affine(attend(q, k, v, args["num_heads"]), out.W, out.b)
        else:
            x = special[name](at[name], x) if name in special else apply_layer(at[name], x)
    return x


def run_lm(base, weights, ids, special, prompt):
    """`prompt["tokens"]`: (tokens, dim) before the embedded input; `prompt["past"]`: per layer (keys, values), each
    (heads, tokens, dim / heads)."""
    at = sites(base, weights)

    def layer(path, x):
        return special[path](at[path], x) if path in special else apply_layer(at[path], x)

    x = layer("embed_tokens", ids)
    if "tokens" in prompt:
        x = np.concatenate([np.repeat(prompt["tokens"][None], len(x), 0), x], 1)
    for i in range(base["depth"]):
        h = layer(f"layers.{i}.norm", x)
        q, k, v = (layer(f"layers.{i}.attn.{n}_proj", h) for n in "qkv")
        seen, heads = 0, base["heads"]
        k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3) for t in (k, v))
        if "past" in prompt:
            pk, pv = prompt["past"][i]
            seen = pk.shape[-2]
            k, v = (np.concatenate([np.repeat(p[None], len(x), 0), t], 2) for p, t in ((pk, k), (pv, v)))
        x = x + layer(f"layers.{i}.attn.o_proj", attend(q, k, v, heads, causal_from=seen))
        x = x + np.tanh(layer(f"layers.{i}.mlp", x))
    return layer("head", x)
