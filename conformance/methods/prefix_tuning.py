"""Prefix tuning: Li and Liang, 2021, https://arxiv.org/abs/2101.00190: keys and values before each layer's."""

from ..method import Fault, Method, Row

KEY = "prompt_embeddings"
DIM, HEADS, LAYERS = 8, 2, 2  # of the causal-lm base


def shared(c, sites):
    return {KEY: (c["num_virtual_tokens"], LAYERS * 2 * DIM)}


def prompt(t, c, order=(0, 1), heads=HEADS):
    """The flat rows hold, for each layer, keys then values, each (heads, dim / heads)."""
    if KEY not in t:
        return {}
    P = t[KEY].reshape(len(t[KEY]), LAYERS, 2, heads, DIM // heads).transpose(1, 2, 3, 0, 4)
    return {"past": [(layer[order[0]], layer[order[1]]) for layer in P]}


def tuning(n, **more):
    return {"task_type": "CAUSAL_LM", "num_virtual_tokens": n, **more}


ROWS = [
    Row("causal-lm/plain", "causal-lm", tuning(3), "core", second={}),
    Row("causal-lm/one-token", "causal-lm", tuning(1)),
    Row("causal-lm/seven-tokens", "causal-lm", tuning(7)),
]

FAULTS = (
    Fault("keys-for-values", "keys and values change places", {"prompt": lambda t, c: prompt(t, c, (1, 0))},
          caught_by=("forward",)),
    Fault("layers-reversed", "the last layer's prefix goes to the first layer",
          {"prompt": lambda t, c: {k: v[::-1] for k, v in prompt(t, c).items()}}, caught_by=("forward",)),
)

METHOD = Method(
    name="prefix_tuning", peft_type="PREFIX_TUNING", title="Prefix tuning", paper="https://arxiv.org/abs/2101.00190",
    equation="K' = [P_K; K], V' = [P_V; V]", rows=ROWS, shapes=lambda site, c: {}, shared=shared, prompt=prompt,
    faults=FAULTS, merges=False, stacks=False, draw={"num_virtual_tokens": [1, 2, 5], "task_type": ["CAUSAL_LM"]},
    draw_bases=("causal-lm",), prompts=True,
)
