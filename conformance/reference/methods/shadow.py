"""Shadow: Li et al., 2026, https://arxiv.org/abs/2604.19254: a small decoder whose state goes along."""

from math import erf

import numpy as np

from ..method import KEY, Fault, Laws, Method, Row, Tensors
from ..numpy_model import apply_layer, decode, loss, sites

DIM, HEADS, KV_HEADS, DEPTH, VOCAB = 8, 2, 1, 3, 13  # of the decoders; KV_HEADS of that with Llama's names
HEAD = DIM // HEADS
BACKBONE, PROJECTION = "base_model.shadow_backbone.default.", "base_model.shadow_projection.default.weight"
DOWN, UP, T, G = (f"shadow_{n}.default" for n in ("down", "up", "update_transform", "update_gate"))


def blocks(c):
    """The paths of the blocks that a config means."""
    given = c.get("target_modules") or [f"layers.{i}" for i in range(DEPTH)]
    return [f"model.{path}" for path in sorted(given)]


def width(c):
    return c.get("shadow_hidden_size") or DIM


def shares(c):
    return c.get("share_embeddings", True) and width(c) == DIM


def backbone(c):
    """The small decoder's parameters."""
    w, heads, llama = width(c), c.get("shadow_num_attention_heads") or HEADS, "layers" in blocks(c)[0]
    found = {"norm.weight": (w,), "norm.bias": (w,), **({} if shares(c) else {"embed_tokens.weight": (VOCAB, w)})}
    for i in range(c.get("shadow_num_hidden_layers") or 1):
        at = f"layers.{i}." if llama else f"h.{i}."
        found |= {f"{at}norm.weight": (w,), f"{at}norm.bias": (w,), f"{at}mlp.weight": (w, w), f"{at}mlp.bias": (w,)}
        if llama:
            q, k = heads * HEAD, KV_HEADS * HEAD
            sizes = {"q": (q, w), "k": (k, w), "v": (k, w), "o": (w, q)}
            found |= {f"{at}self_attn.{n}_proj.weight": size for n, size in sizes.items()}
        else:
            for name, out in (("c_attn", 3 * w), ("c_proj", w)):
                found |= {f"{at}attn.{name}.weight": (w, out), f"{at}attn.{name}.bias": (out,)}
    return found


def shared(c, sites):
    r = c.get("r", 8)
    u = c.get("update_hidden_size") or r
    found = {BACKBONE + k: v for k, v in backbone(c).items()}
    if width(c) != DIM:
        found[PROJECTION] = (DIM, width(c))
    for path in blocks(c):
        found |= {f"{KEY}{path}.{DOWN}.weight": (r, DIM), f"{KEY}{path}.{UP}.weight": (DIM, r)}
        for net in (T, G):
            found |= {f"{KEY}{path}.{net}.0.weight": (u, DIM), f"{KEY}{path}.{net}.0.bias": (u,),
                      f"{KEY}{path}.{net}.2.weight": (DIM, u), f"{KEY}{path}.{net}.2.bias": (DIM,)}
    return found


def gelu(x):
    return x / 2 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def mlp(t, net, x):
    h = gelu(x @ t[f"{net}.0.weight"].T + t[f"{net}.0.bias"])
    return h @ t[f"{net}.2.weight"].T + t[f"{net}.2.bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def start(base, weights, t, c, inputs):
    """s_0 (batch, length, dim)."""
    own = {k.removeprefix(BACKBONE): v for k, v in t.items() if k.startswith(BACKBONE)}
    words = weights["model.embed_tokens.weight"] if shares(c) else own["embed_tokens.weight"]
    heads = c.get("shadow_num_attention_heads") or base["heads"]
    small = {**base, "depth": c.get("shadow_num_hidden_layers") or 1, "heads": heads}
    s = decode(small, sites(small, {f"model.{k}": v for k, v in own.items()}), np.asarray(words)[inputs["input_ids"]],
               {})
    return s @ t[PROJECTION].T if PROJECTION in t else s


def own_loss(tensors, c, base, weights, inputs):
    """What the small decoder's own prediction, by the model's head, is worth: eq. 8 and 9."""
    if c.get("task_type") != "CAUSAL_LM":
        return 0.0
    t = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
    logits = start(base, weights, t, c, inputs) @ weights["head.weight"].T
    return c.get("auxiliary_loss_weight", 0.05) * loss(base, logits, inputs["labels"])


def advance(s, t, g):
    return (1 - g) * s + g * t


def route(base, weights, tensors, c, inputs, advance=advance, sign=1.0, late=False, early=False, first=start,
          drop=lambda d: d):
    t = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
    if not t:
        return {}
    paths, state = blocks(c), {"s": first(base, weights, t, c, inputs)}

    def of(path):
        own_t = {k.removeprefix(f"{KEY}{path}."): v for k, v in t.items() if k.startswith(f"{KEY}{path}.")}

        def run(own, h):
            d = c.get("shadow_alpha", 0.1) * sign * drop(h - state["s"]) @ own_t[f"{DOWN}.weight"].T
            d = d @ own_t[f"{UP}.weight"].T
            out = own(h) + d if late else own(h + d)
            seen = h if early else out
            state["s"] = advance(state["s"], mlp(own_t, T, seen), sigmoid(mlp(own_t, G, seen)))
            return out

        return run

    return {path: of(path) for path in paths}


def shadow(**more):
    return {"r": 3, "shadow_alpha": 0.5, **more}


ROWS = [
    Row("llama/plain", "decoder-llama", shadow(), "core", second=shadow(r=2)),
    Row("llama/narrow", "decoder-llama", shadow(shadow_hidden_size=4, shadow_num_hidden_layers=2, update_hidden_size=5),
        "core", second=shadow(update_hidden_size=2)),
    Row("llama/own-embeddings", "decoder-llama", shadow(share_embeddings=False, shadow_alpha=0.75)),
    Row("llama/one-head", "decoder-llama", shadow(shadow_num_attention_heads=1, r=4)),
    Row("llama/first-blocks", "decoder-llama", shadow(target_modules=["layers.0", "layers.1"])),
    Row("llama/last-blocks", "decoder-llama", shadow(target_modules=["layers.1", "layers.2"])),
    Row("llama/task", "decoder-llama", shadow(r=2, task_type="CAUSAL_LM")),
    Row("gpt2/plain", "decoder-gpt2", shadow(target_modules=["h.0", "h.1", "h.2"]), "core"),
]


def wrong(**how):
    return {"route": lambda base, weights, t, c, inputs: route(base, weights, t, c, inputs, **how)}


FAULTS = (
    Fault("state-stays", "the shadow's state is that before the first block, in all of them",
          wrong(advance=lambda s, t, g: s), caught_by=("forward",)),
    Fault("gate-reversed", "the gate says what stays of the state, not what is new",
          wrong(advance=lambda s, t, g: advance(t, s, g)), caught_by=("forward",)),
    Fault("no-gate", "the state is replaced in every block", wrong(advance=lambda s, t, g: t), caught_by=("forward",)),
    Fault("difference-reversed", "s - h goes into a block, not h - s", wrong(sign=-1.0), caught_by=("forward",)),
    Fault("after-the-block", "the correction is added to a block's output", wrong(late=True), caught_by=("forward",)),
    Fault("state-from-inputs", "the state is advanced by a block's input", wrong(early=True), caught_by=("forward",)),
    Fault("words-for-state", "the state begins as the embedded words",
          wrong(first=lambda base, weights, t, c, inputs: apply_layer(
              sites(base, weights)["model.embed_tokens"], inputs["input_ids"])), caught_by=("forward",)),
)


def perturb(key, fresh, rng):
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.3 * rng.normal(size=fresh.shape)
    return rng.normal(size=fresh.shape) * (0.3 if key.endswith("bias") else 1 / np.sqrt(fresh.shape[-1]))


def idle(key, c):
    """The state after the last block goes nowhere."""
    return key.startswith((f"{KEY}{blocks(c)[-1]}.{T}", f"{KEY}{blocks(c)[-1]}.{G}"))


METHOD = Method(
    name="shadow", peft_type="SHADOW", title="Shadow", paper="https://arxiv.org/abs/2604.19254",
    equation="h_l = F_l(h + a U D (h - s)), s_l = (1 - g) s + g t", rows=ROWS, shapes=lambda site, c: {}, route=route,
    faults=FAULTS, merges=False, penalty=own_loss,
    tensors=Tensors(shared=shared, perturb=perturb, neutral={f"{UP}.weight": 0.0}),
    laws=Laws(draw={"r": [1, 3], "shadow_alpha": [0.5, 1.0], "update_hidden_size": [None, 2],
                    "shadow_hidden_size": [None, 4], "share_embeddings": [True, False]}, stacks=False,
              mixed_batch=True, idle=idle, bases=("decoder-three",)),
)
