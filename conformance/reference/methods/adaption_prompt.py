"""Adaption prompts (LLaMA-Adapter): Zhang et al., 2023, https://arxiv.org/abs/2303.16199, section 3.2."""

import numpy as np

from ..method import KEY, Fault, Laws, Method, Row, Tensors
from ..numpy_model import apply_layer, heads_of, sites, softmax, turned

DIM, DEPTH = 8, 3  # of the decoders
PROMPT, GATE = "adaption_prompt", "adaption_gate"


def shared(c, sites):
    """The last layers' prompts and gates. `target_modules` tells which decoder it is."""
    stem, last = ("h", "attn") if c.get("target_modules") == "attn" else ("layers", "self_attn")
    at = [f"{KEY}model.{stem}.{i}.{last}." for i in range(DEPTH)[-c["adapter_layers"]:]]
    return {**{f"{path}{PROMPT}": (1, c["adapter_len"], DIM) for path in at}, **{f"{path}{GATE}": (1,) for path in at}}


def route(base, weights, tensors, c, inputs, rotated=True, scale=True, together=False, projected=True,
          shared_heads=lambda s, repeats: np.repeat(s, repeats, 1)):
    t = {k.removeprefix(KEY): np.asarray(v, np.float64) for k, v in tensors.items()}
    at, llama, heads = sites(base, weights), base["names"] == "llama", base["heads"]

    def of(path):
        P, g = t[f"{path}.{PROMPT}"], t[f"{path}.{GATE}"]

        def split(x, names):
            """Queries, keys and values that the frozen layers give for x."""
            if llama:
                return [heads_of(apply_layer(at[f"{path}.{n}_proj"], x), DIM // heads) for n in names]
            parts = np.split(apply_layer(at[f"{path}.c_attn"], x), 3, -1)
            return [heads_of(parts["qkv".index(n)], DIM // heads) for n in names]

        def run(own, x):
            (q,), (k, v) = split(x, "q"), split(P, "kv")
            if llama:
                q = turned(q) if rotated else q
                k, v = (shared_heads(s, heads // s.shape[1]) for s in (k, v))
            score = q @ k.swapaxes(-1, -2) / (np.sqrt(q.shape[-1]) if scale else 1)
            y = (softmax(score * g) if together else g * softmax(score)) @ v
            y = y.transpose(0, 2, 1, 3).reshape(x.shape)
            return own(x) + (apply_layer(at[f"{path}.o_proj"], y) if llama and projected else y)

        return run

    return {path: of(path) for path in {k.rpartition(".")[0] for k in t}}


def prompts(tokens, layers, **more):
    return {"adapter_len": tokens, "adapter_layers": layers, **more}


ROTATED = ("llama/all-layers", "llama/two-layers", "llama/one-token", "llama/task", "llama/two-adapters")
STAYS = "the reference writes tensors meant for an adapter that is not active into the active one"
COARSE = ("float32", "bfloat16")  # the reference takes the softmax in float32
ROWS = [
    Row("llama/all-layers", "decoder-llama", prompts(3, 3), "core", dtypes=COARSE),
    Row("llama/two-adapters", "decoder-llama", prompts(2, 3), second=prompts(3, 1), golden="formula", note=STAYS,
        dtypes=COARSE),
    Row("llama/two-layers", "decoder-llama", prompts(4, 2), dtypes=COARSE),
    Row("llama/one-token", "decoder-llama", prompts(1, 3, target_modules="self_attn"), dtypes=COARSE),
    Row("llama/grouped", "decoder-grouped", prompts(3, 2), dtypes=COARSE),
    Row("llama/task", "decoder-llama", prompts(2, 3, task_type="CAUSAL_LM"), dtypes=COARSE),
    Row("gpt2/all-layers", "decoder-gpt2", prompts(3, 3, target_modules="attn"), "core", dtypes=COARSE),
    Row("gpt2/one-layer", "decoder-gpt2", prompts(4, 1, target_modules="attn"), dtypes=COARSE),
]


def wrong(**how):
    return {"route": lambda base, weights, t, c, inputs: route(base, weights, t, c, inputs, **how)}


FAULTS = (
    Fault("queries-not-rotated", "the queries are taken before they are rotated by position", wrong(rotated=False),
          caught_by=("forward",), cases=tuple(r for r in ROTATED if "one-token" not in r)),
    Fault("unscaled", "scores are not divided by the root of a head's width", wrong(scale=False),
          caught_by=("forward",), spares=("llama/one-token",)),
    Fault("first-queries-only", "shared keys and values reach the first of the queries that share them",
          wrong(shared_heads=lambda s, n: np.concatenate([s, *[0 * s] * (n - 1)], 1)), caught_by=("forward",),
          cases=ROTATED),
    Fault("heads-in-turns", "queries share keys and values in turns, not side by side",
          wrong(shared_heads=lambda s, n: np.tile(s, (1, n, 1, 1))), caught_by=("forward",), cases=("llama/grouped",)),
    Fault("gate-inside", "the gate multiplies the scores, not what they give", wrong(together=True),
          caught_by=("forward",)),
    Fault("not-projected", "what the prompt gives does not go through o_proj", wrong(projected=False),
          caught_by=("forward",), cases=ROTATED),
    Fault("first-layers", "the prompts of the last layers go to the first ones",
          {"route": lambda base, weights, t, c, inputs: route(base, weights, moved(t), c, inputs)},
          caught_by=("forward",), cases=("llama/two-layers", "gpt2/one-layer")),
)


def moved(tensors):
    """The same tensors, as many layers further down as there are layers without."""
    number = lambda key: int(key.split(".")[4])
    down = min(map(number, tensors), default=0)
    return {k.replace(f".{number(k)}.", f".{number(k) - down}."): v for k, v in tensors.items()}


METHOD = Method(
    name="adaption_prompt", peft_type="ADAPTION_PROMPT", title="Adaption prompt",
    paper="https://arxiv.org/abs/2303.16199", equation="y = Attention(x) + g softmax(Q K_P^T / sqrt(d)) V_P W_O",
    rows=ROWS, shapes=lambda site, c: {}, route=route, faults=FAULTS, merges=False,
    tensors=Tensors(shared=shared, neutral={GATE: 0.0},
                    perturb=lambda key, fresh, rng: rng.normal(size=fresh.shape) + 3 * key.endswith(GATE)),
    laws=Laws(draw={"adapter_len": [1, 3], "adapter_layers": [1, 2, 3]}, stacks=False, mixed_batch=True,
              bases=("decoder-three",)),
)
