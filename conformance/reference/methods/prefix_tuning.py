"""Prefix tuning: Li and Liang, 2021, https://arxiv.org/abs/2101.00190: keys and values before each layer's.

With a projection they come out of a network, which is trained and not saved.
"""

import numpy as np

from ..bases import TYPES
from ..method import Fault, Laws, Method, Prompt, Row, Tensors
from .lora import without_types
from .prompt_tuning import FIRST_TOKEN

KEY, LIVE = "prompt_embeddings", "prompt_encoder.default."
DIM, HEADS, LAYERS = 8, 2, 2  # of the language models


def shared(c, sites):
    return {KEY: (c["num_virtual_tokens"], LAYERS * 2 * c.get("token_dim", DIM))}


def live(c):
    if not c.get("prefix_projection"):
        return {}
    h, width = c["encoder_hidden_size"], LAYERS * 2 * DIM
    shapes = {"embedding.weight": (c["num_virtual_tokens"], DIM), "transform.0.weight": (h, DIM),
              "transform.0.bias": (h,), "transform.2.weight": (width, h), "transform.2.bias": (width,)}
    return {LIVE + k: v for k, v in shapes.items()}


def project(t, c, activation=np.tanh):
    E, W, b, V, d = (np.asarray(t[k], np.float64) for k in live(c))
    return activation(E @ W.T + b) @ V.T + d


def packed(cache, tokens):
    """The rows of a prefix that holds the first of a cache's keys and values, layer by layer."""
    parts = [cache[f"{i}.{part}"][0, :, :tokens] for i in range(len(cache) // 2) for part in ("keys", "values")]
    return np.stack([np.asarray(part, np.float64).swapaxes(0, 1) for part in parts], 1).reshape(tokens, -1)


def prompt(t, c, order=(0, 1), heads=None, project=project):
    """The flat rows hold, for each layer, keys then values, each (heads, dim / heads)."""
    flat, heads = t[KEY] if KEY in t else project(t, c), heads or c.get("num_attention_heads", HEADS)
    P = flat.reshape(len(flat), LAYERS, 2, heads, -1).transpose(1, 2, 3, 0, 4)
    return {"past": [(layer[order[0]], layer[order[1]]) for layer in P]}


def tuning(n, task="CAUSAL_LM", **more):
    return {"task_type": task, "num_virtual_tokens": n, **more}


GROUPED = {"token_dim": 6, "num_attention_heads": 1}  # of the keys: PEFT finds these by itself, and saves them
MASK = {"attention_mask": {"values": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}}
REPEATED = "in an encoder-decoder the keys and values of every other layer go to two layers each, the others to none"

ROWS = [
    Row("causal-lm/plain", "causal-lm", tuning(3), "core", second={}),
    Row("causal-lm/one-token", "causal-lm", tuning(1)),
    Row("causal-lm/seven-tokens", "causal-lm", tuning(7)),
    Row("causal-lm/masked", "causal-lm", tuning(3), inputs=MASK),
    Row("causal-lm/grouped", "causal-lm-grouped", tuning(3, **GROUPED)),
    Row("causal-lm/loss", "causal-lm", tuning(5), inputs={"labels": [[2, 5], 13]}),
    Row("causal-lm/projection", "causal-lm", tuning(3, prefix_projection=True, encoder_hidden_size=5), "core",
        live=True),
    Row("encoder/features", "encoder", tuning(3, "FEATURE_EXTRACTION"), inputs=MASK),
    Row("encoder/sequence", "encoder-sequence", tuning(3, "SEQ_CLS"), "core", inputs=MASK),
    Row("encoder/token-types", "encoder-types", tuning(3, "SEQ_CLS"), inputs={**MASK, **TYPES}),
    Row("encoder/token-types-dropped", "encoder-types-features", tuning(3, "FEATURE_EXTRACTION"),
        inputs={**MASK, **TYPES}, note="the reference passes no types on for this task"),
    Row("encoder/tokens", "encoder-tokens", tuning(3, "TOKEN_CLS"), inputs=MASK),
    Row("encoder/tokens-loss", "encoder-tokens", tuning(3, "TOKEN_CLS"), inputs={"labels": [[2, 5], 3]}),
    Row("encoder/answers", "encoder-answers", tuning(3, "QUESTION_ANS"), inputs=MASK),
    Row("encoder-decoder/plain", "encoder-decoder", tuning(3, "SEQ_2_SEQ_LM"), disputed=REPEATED,
        inputs={**MASK, "decoder_input_ids": [[2, 4], 13],
                "decoder_attention_mask": {"values": [[1, 1, 1, 1], [1, 1, 0, 0]]}}),
]

FAULTS = (
    FIRST_TOKEN,
    Fault("token-types-lost", "token_type_ids do not reach the model", {"forward": without_types},
          caught_by=("forward",), cases=("encoder/token-types",)),
    Fault("keys-for-values", "keys and values change places", {"prompt": lambda t, c: prompt(t, c, (1, 0))},
          caught_by=("forward",)),
    Fault("layers-reversed", "the last layer's prefix goes to the first layer",
          {"prompt": lambda t, c: {k: v[::-1] for k, v in prompt(t, c).items()}}, caught_by=("forward",)),
    Fault("relu-for-tanh", "the projection has a ReLU between its layers",
          {"prompt": lambda t, c: prompt(t, c, project=lambda t, c: project(t, c, lambda x: np.maximum(x, 0)))},
          caught_by=("forward",), cases=("causal-lm/projection",)),
)

METHOD = Method(
    name="prefix_tuning", peft_type="PREFIX_TUNING", title="Prefix tuning", paper="https://arxiv.org/abs/2101.00190",
    equation="K' = [P_K; K], V' = [P_V; V]", rows=ROWS, shapes=lambda site, c: {}, faults=FAULTS, merges=False,
    tensors=Tensors(shared=shared),
    prompt=Prompt(formula=prompt, live=live, saved=lambda t, c: {KEY: project(t, c)}),
    laws=Laws(draw={"num_virtual_tokens": [1, 2, 5], "task_type": ["CAUSAL_LM"]}, stacks=False, bases=("causal-lm",)),
)
