"""The base models in NumPy float64: an independent second implementation, which the formulas are run on.

A `Site` is one weight that an adapter can sit on, in one layout for all kinds: W is (out, in, *kernel), for Experts
(experts, out, in). What is stored as (in, out) - Embedding, Conv1D, transposed Experts - is turned here, so formulas
need to know one layout only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LANGUAGE_MODELS = ("causal_lm", "encoder", "encoder_decoder", "decoder")
NO_LABEL = -100


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


def parameters_of(base, weights) -> list:
    """The weights but for those that are buffers, which are never trained."""
    held = {f"{name}.centre" for name, kind, _ in layers_of(base) if kind == "Centred"}
    return [k for k in weights if k not in held]


def sites(base, weights):
    """Every adaptable weight of a base model, by its path."""
    found = {}

    def put(path, kind, weight, bias, args):
        W = np.asarray(weights[weight], np.float64)
        b = weights.get(bias)
        if flipped(kind, args):
            W = W.swapaxes(-1, -2)
        found[path] = Site(path, kind, W, None if b is None else np.asarray(b, np.float64), weight, bias, args)

    if base.get("model") in LANGUAGE_MODELS:
        for name in weights:
            if name.endswith(".weight"):
                path = name[: -len(".weight")]
                kind = "Embedding" if "embed_" in path else "LayerNorm" if path.endswith("norm") else "Linear"
                kind = "Conv1D" if path.endswith((".c_attn", ".c_proj")) else kind
                put(path, kind, name, path + ".bias", {})
    for name, kind, args in layers_of(base):
        if kind == "MultiheadAttention":
            put(name, "Linear", f"{name}.in_proj_weight", f"{name}.in_proj_bias", args)
            put(f"{name}.base_layer.out_proj", "Linear", f"{name}.out_proj.weight", f"{name}.out_proj.bias", args)
        elif kind == "Pair":  # the wrapper of the second parameter is around that of the first
            put(f"{name}.base_layer", "Matrix", f"{name}.up", "", args)
            put(name, "Matrix", f"{name}.down", "", args)
        elif kind == "Centred":
            put(name, kind, f"{name}.weight", f"{name}.centre", args)
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


def attend(q, k, v, heads, causal_from=None, mask=None):
    """q: (batch, n, dim), k and v: (batch, m, dim) or already split (batch, heads, m, dim / heads).

    `mask` (batch, m) is 0 where a token is hidden.
    """
    def split(t):
        return t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3) if t.ndim == 3 else t

    q, k, v = split(q), split(k), split(v)
    score = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal_from is not None:
        seen = np.tril(np.ones(score.shape[-2:], bool), causal_from)
        score = np.where(seen, score, -np.inf)
    if mask is not None:
        score = np.where(np.asarray(mask)[:, None, None] > 0, score, -np.inf)
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
        return W.T[x] * site.args.get("embed_scale", 1)
    if site.kind.startswith("Conv") and site.kind != "Conv1D":
        return conv(x, W, b, site.args)
    if site.kind == "LayerNorm":
        return norm(x, W, b)
    if site.kind == "Centred":
        return W * (x - b)
    if site.kind == "Experts":
        return np.einsum("...i,eoi->...eo", x, W).mean(-2)
    return affine(x, W, b)


def run(base, weights, inputs, special=None, prompt=None):
    """The model's output. `special`: path -> function(site, x) in place of a layer.

    `prompt`: see `run_language_model`.
    """
    at, special = sites(base, weights), special or {}
    if base.get("model") == "decoder":
        x = decode(base, at, apply_layer(at["model.embed_tokens"], inputs["input_ids"]), special)
        return apply_layer(at["head"], x)
    if base.get("model") in LANGUAGE_MODELS:
        return run_language_model(base, at, inputs, special, prompt or {})
    x = inputs["x"]
    for name, kind, args in base["layers"]:
        if kind == "Tanh":
            x = np.tanh(x)
        elif kind == "MultiheadAttention":
            into, out = at[name], at[f"{name}.base_layer.out_proj"]
            q, k, v = np.split(affine(x, into.W, into.b), 3, -1)
            x = affine(attend(q, k, v, args["num_heads"]), out.W, out.b)
        elif kind == "Pair":
            x = affine(np.tanh(affine(x, at[f"{name}.base_layer"].W, None)), at[name].W, None)
        else:
            x = special[name](at[name], x) if name in special else apply_layer(at[name], x)
    return x


def run_language_model(base, at, inputs, special, prompt):
    """`prompt["tokens"]`: (tokens, dim), or (batch, tokens, dim), before the embedded input; `prompt["decoder_tokens"]`
    before that of a decoder; `prompt["past"]`: per layer (keys, values), each (heads, tokens, dim / heads)."""
    heads = base["heads"]
    kv_heads = base.get("kv_heads", heads)

    def layer(path, x):
        return special[path](at[path], x) if path in special else apply_layer(at[path], x)

    def in_front(tokens, ids):
        x = layer("encoder.embed_tokens" if base["model"] == "encoder" else "embed_tokens", ids)
        return x if tokens is None else np.concatenate([np.broadcast_to(tokens, (len(x), *tokens.shape[-2:])), x], 1)

    def shown(mask, length):
        """The mask with ones for the prompt."""
        if mask is None:
            return None
        return np.concatenate([np.ones((len(mask), length - mask.shape[1]), int), mask], 1)

    def stack(path, x, mask, past=None, causal=False, memory=None, memory_mask=None):
        seen = 0 if past is None else past[0][0].shape[-2]
        if f"{path}embed_positions" in at:
            x = x + layer(f"{path}embed_positions", np.arange(seen, seen + x.shape[1]))
        for i in range(base["depth"]):
            at_i = f"{path}layers.{i}."
            h = layer(f"{at_i}norm", x)
            q, k, v = (layer(f"{at_i}attn.{n}_proj", h) for n in "qkv")
            k, v = (heads_of(t, t.shape[-1] // kv_heads) for t in (k, v))
            if past is not None:
                k, v = (np.concatenate([np.repeat(p[None], len(x), 0), t], 2) for p, t in zip(past[i], (k, v)))
            k, v = (np.repeat(t, heads // kv_heads, 1) for t in (k, v))  # queries share keys
            y = attend(q, k, v, heads, seen if causal else None, shown(mask, k.shape[2]))
            x = x + layer(f"{at_i}attn.o_proj", y)
            if memory is not None:
                q = layer(f"{at_i}cross_attn.q_proj", layer(f"{at_i}cross_norm", x))
                k, v = (layer(f"{at_i}cross_attn.{n}_proj", memory) for n in "kv")
                x = x + layer(f"{at_i}cross_attn.o_proj", attend(q, k, v, heads, mask=shown(memory_mask, k.shape[1])))
            x = x + np.tanh(layer(f"{at_i}mlp", x))
        return x

    mask, tokens, past = inputs.get("attention_mask"), prompt.get("tokens"), prompt.get("past")
    x = in_front(tokens, inputs["input_ids"])
    if base["model"] == "causal_lm":
        return layer("head", stack("", x, mask, past, causal=True))
    if base["model"] == "encoder_decoder":
        memory = stack("encoder.", x, mask)
        ids = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else shifted(inputs["labels"])
        later = in_front(prompt.get("decoder_tokens"), ids)
        x = stack("decoder.", later, inputs.get("decoder_attention_mask"), past, True, memory, mask)
        return layer("head", x)
    if "token_type_ids" in inputs and not (prompt and base["task"] == "FEATURE_EXTRACTION"):
        given = inputs["token_type_ids"]  # PEFT drops them for this task, and takes those of a prompt to be 0
        x = x + layer("encoder.embed_types", np.pad(given, [(0, 0), (x.shape[1] - given.shape[1], 0)]))
    x = stack("encoder.", x, mask, past)
    if base["task"] == "FEATURE_EXTRACTION":
        return x
    if base["task"] == "SEQ_CLS":
        weight = np.ones(x.shape[:2]) if mask is None else shown(mask, max(x.shape[1], mask.shape[1]))[:, -x.shape[1]:]
        x = (x * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
    return layer("qa_outputs" if base["task"] == "QUESTION_ANS" else "classifier", x)


def heads_of(x, d):
    """(batch, n, heads * d) as (batch, heads, n, d)."""
    return x.reshape(*x.shape[:2], -1, d).transpose(0, 2, 1, 3)


def turned(x, base=10.0):
    """x (batch, heads, n, d) rotated by position, the first half of d against the second."""
    n, d = x.shape[2:]
    angles = np.arange(n)[:, None] * base ** (-np.arange(d // 2) * 2 / d)
    c, s = np.cos(angles), np.sin(angles)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def decode(base, at, x, special, stem="model."):
    """Hidden states of a decoder after its norm, for embedded words x (batch, n, hidden).

    `special` may hold functions for whole modules, by path: they get the frozen module, as a function, and its input.
    """
    def whole(path, own, x):
        return special[path](own, x) if path in special else own(x)

    def layer(path, x):
        return apply_layer(at[path], x)

    for i in range(base["depth"]):
        llama = base["names"] == "llama"
        at_i = f"{stem}{'layers' if llama else 'h'}.{i}"
        here = f"{at_i}.{'self_attn' if llama else 'attn'}"

        def attention(h, here=here, llama=llama):
            heads = base["heads"]
            if llama:
                d = at[f"{here}.q_proj"].out // heads
                q, k, v = (heads_of(layer(f"{here}.{n}_proj", h), d) for n in "qkv")
                q, k, repeats = turned(q), turned(k), heads // k.shape[1]
                k, v = np.repeat(k, repeats, 1), np.repeat(v, repeats, 1)
            else:
                d = h.shape[-1] // heads
                q, k, v = (heads_of(part, d) for part in np.split(layer(f"{here}.c_attn", h), 3, -1))
            y = attend(q.transpose(0, 2, 1, 3).reshape(*h.shape[:2], -1), k, v, heads, 0)
            return layer(f"{here}.{'o_proj' if llama else 'c_proj'}", y)

        def block(x, at_i=at_i, here=here, attention=attention):
            x = x + whole(here, attention, layer(f"{at_i}.norm", x))
            return x + np.tanh(layer(f"{at_i}.mlp", x))

        x = whole(at_i, block, x)
    return layer(f"{stem}norm", x)


def shifted(labels, start=1, pad=0):
    """What a decoder is given to predict `labels`."""
    return np.maximum(np.concatenate([np.full_like(labels[:, :1], start), labels[:, :-1]], 1), pad)


def cross_entropy(logits, labels):
    """The mean over all labels but NO_LABEL. logits: (..., classes), labels: (...)."""
    at = labels != NO_LABEL
    return -np.log(softmax(logits[at])[np.arange(at.sum()), labels[at]]).mean()


def loss(base, logits, labels):
    """A language model's loss; a prompt in front of the input has no labels."""
    if base.get("task") == "SEQ_CLS":
        return cross_entropy(logits, labels)
    missing = np.full((len(labels), logits.shape[1] - labels.shape[1]), NO_LABEL)
    labels = np.concatenate([missing, labels], 1)
    if base["model"] in ("causal_lm", "decoder"):
        return cross_entropy(logits[:, :-1], labels[:, 1:])
    return cross_entropy(logits, labels)
