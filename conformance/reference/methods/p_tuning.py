"""P-tuning: Liu et al., 2021, https://arxiv.org/abs/2103.10385: a network makes the vectors before the input.

The network is trained and not saved: a checkpoint holds the vectors that came out of it.
"""

import numpy as np

from ..method import Fault, Laws, Method, Prompt, Row, Tensors

KEY, LIVE = "prompt_embeddings", "prompt_encoder.default."
DIM = 8  # of the language models


def total(c):
    """Encoder-decoders have vectors for both stacks, and use the first half."""
    return c["num_virtual_tokens"] * (2 if c["task_type"] == "SEQ_2_SEQ_LM" else 1)


def live(c):
    h = c["encoder_hidden_size"]
    shapes: dict[str, tuple] = {"embedding.weight": (total(c), DIM)}
    if c.get("encoder_reparameterization_type") != "LSTM":
        sizes = {"mlp_head.0": (h, DIM), "mlp_head.2": (h, h), "mlp_head.4": (DIM, h)}
    else:
        sizes = {"mlp_head.0": (2 * h, 2 * h), "mlp_head.2": (DIM, 2 * h)}
        for layer in range(c.get("encoder_num_layers", 2)):
            for way in ("", "_reverse"):
                inputs = DIM if layer == 0 else 2 * h
                at = f"lstm_head.{{}}_l{layer}{way}"
                shapes |= {at.format("weight_ih"): (4 * h, inputs), at.format("weight_hh"): (4 * h, h),
                           at.format("bias_ih"): (4 * h,), at.format("bias_hh"): (4 * h,)}
    for name, size in sizes.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return {LIVE + k: v for k, v in shapes.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, p, at, gates="ifgo"):
    """One direction of one layer over x: (tokens, width)."""
    h = cell = np.zeros(p["lstm_head.weight_hh" + at].shape[1])
    out = []
    for row in x:
        z = p["lstm_head.weight_ih" + at] @ row + p["lstm_head.bias_ih" + at]
        z = z + p["lstm_head.weight_hh" + at] @ h + p["lstm_head.bias_hh" + at]
        g = dict(zip(gates, np.split(z, 4)))
        cell = sigmoid(g["f"]) * cell + sigmoid(g["i"]) * np.tanh(g["g"])
        h = sigmoid(g["o"]) * np.tanh(cell)
        out.append(h)
    return np.stack(out)


def encode(t, c, gates="ifgo", backwards=True, relu=True, drop=lambda h: h):
    p = {k.removeprefix(LIVE): np.asarray(v, np.float64) for k, v in t.items()}
    x = p["embedding.weight"]
    if c.get("encoder_reparameterization_type") == "LSTM":
        for layer in range(c.get("encoder_num_layers", 2)):
            x = drop(x) if layer else x
            there = lstm(x, p, f"_l{layer}", gates)
            back = lstm(x[::-1] if backwards else x, p, f"_l{layer}_reverse", gates)
            x = np.concatenate([there, back[::-1] if backwards else back], 1)
    last = max(k for k in p if k.startswith("mlp_head"))[: len("mlp_head.0")]
    for i in range(0, int(last[-1]) + 1, 2):
        x = x @ p[f"mlp_head.{i}.weight"].T + p[f"mlp_head.{i}.bias"]
        if relu and f"mlp_head.{i}" != last:
            x = np.maximum(x, 0)
    return x


def prompt(t, c, encode=encode):
    vectors = t[KEY] if KEY in t else encode(t, c)
    return {"tokens": vectors[: c["num_virtual_tokens"]]}


def tuning(n, **more):
    return {"task_type": "CAUSAL_LM", "num_virtual_tokens": n, "encoder_hidden_size": 5, **more}


def save_raw(o, right, path):
    o.saved = lambda name="default": {KEY: o.adapters[name][1][LIVE + "embedding.weight"]}
    right(path)
    del o.saved


def wrong(**how):
    return {"prompt": lambda t, c: prompt(t, c, encode=lambda t, c: encode(t, c, **how))}


LSTM = {"encoder_reparameterization_type": "LSTM"}
EXACT = ("float64", "float32")  # two recurrent layers in bfloat16 are beyond its tolerance
LOADED, LSTMS = ("causal-lm/loaded",), ("causal-lm/lstm", "causal-lm/lstm-one-layer")
ROWS = [
    Row("causal-lm/loaded", "causal-lm", tuning(3, inference_mode=True), "core", second={}),
    Row("causal-lm/mlp", "causal-lm", tuning(3), "core", live=True),
    Row("causal-lm/lstm", "causal-lm", tuning(3, **LSTM), "core", live=True, dtypes=EXACT),
    Row("causal-lm/lstm-one-layer", "causal-lm", tuning(4, encoder_num_layers=1, **LSTM), live=True, dtypes=EXACT),
    Row("encoder-decoder/mlp", "encoder-decoder", tuning(3, task_type="SEQ_2_SEQ_LM"), live=True,
        inputs={"decoder_input_ids": [[2, 4], 13]}),
]

FAULTS = (
    Fault("encoder-skipped", "the embeddings are used as they are",
          {"prompt": lambda t, c: prompt(t, c, encode=lambda t, c: t[LIVE + "embedding.weight"])},
          caught_by=("forward",), spares=LOADED),
    Fault("no-relu", "the layers of the network have no ReLU between them", wrong(relu=False), caught_by=("forward",),
          spares=LOADED),
    Fault("one-way-only", "the LSTM reads forwards in both directions", wrong(backwards=False),
          caught_by=("forward",), cases=LSTMS),
    Fault("gates-exchanged", "the LSTM's input and forget gates change places", wrong(gates="figo"),
          caught_by=("forward",), cases=LSTMS),
    Fault("encoder-saved-raw", "a checkpoint holds the embeddings that the network starts from",
          {"save": save_raw}, caught_by=("save",), cases=("causal-lm/mlp",)),
)

METHOD = Method(
    name="p_tuning", peft_type="P_TUNING", title="P-tuning", paper="https://arxiv.org/abs/2103.10385",
    equation="x' = [MLP(BiLSTM(E)); E(x)]", rows=ROWS, shapes=lambda site, c: {}, faults=FAULTS, merges=False,
    tensors=Tensors(shared=lambda c, sites: {KEY: (total(c), DIM)},
                    perturb=lambda key, fresh, rng: 0.6 * rng.normal(size=fresh.shape)),
    prompt=Prompt(formula=prompt, live=live, saved=lambda t, c: {KEY: encode(t, c)}),
    laws=Laws(draw={"num_virtual_tokens": [1, 2, 5], "task_type": ["CAUSAL_LM"], "encoder_hidden_size": [5],
                    "encoder_reparameterization_type": ["MLP", "LSTM"], "inference_mode": [True]}, stacks=False,
              bases=("causal-lm",)),
)
