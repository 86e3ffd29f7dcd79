"""aLoRA: Greenewald et al., 2025, https://arxiv.org/abs/2504.12397.

`alora_offsets` say where it begins, or the last place where the invocation stands in `input_ids`.
"""

from functools import partial

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from ..numpy_model import apply_layer
from . import lora as LoRA


def begins_before_the_end(offsets, length):
    """Which tokens it acts on, (batch, length, 1): the last `offsets` of each sample."""
    return (np.arange(length) >= length - offsets[:, None])[..., None]


def last_invocation(ids, tokens, which=-1):
    """How many tokens of each sample there are from the last invocation on; 0: it has none."""
    n = len(tokens)
    places = [[i for i in range(len(text) - n + 1) if list(text[i : i + n]) == list(tokens)] for text in ids]
    return np.array([len(text) - at[which] if at else 0 for text, at in zip(ids, places)])


def run(site, t, c, x, inputs, on=begins_before_the_end, found=last_invocation):
    W, b = LoRA.formula(site, t, c)
    change = x @ (W - site.W).T + (0 if b is None else b - (0 if site.b is None else site.b))
    offsets = inputs.get("alora_offsets")
    offsets = found(inputs["input_ids"], c["alora_invocation_tokens"]) if offsets is None else np.asarray(offsets)
    return apply_layer(site, x) + on(offsets, x.shape[1]) * change


def counted_from_the_start(offsets, length):
    return (np.arange(length) >= offsets[:, None])[..., None]


def one_token_late(offsets, length):
    return begins_before_the_end(offsets - 1, length)


def everywhere(offsets, length):
    return np.ones((len(offsets), length, 1))


def alora(**more):
    return LoRA.lora(alora_invocation_tokens=[5, 9], **more)


OFFSETS = {"alora_offsets": {"values": [4, 0, 1]}}
ROWS = [
    Row("linear/plain", "mlp-tokens", alora(), "core", inputs=OFFSETS, second=alora(r=2)),
    Row("linear/rslora", "mlp-tokens", alora(use_rslora=True, r=3), inputs=OFFSETS),
    Row("linear/beyond-the-input", "mlp-tokens", alora(), inputs={"alora_offsets": {"values": [9, 2, 3]}}),
    Row("linear/bias", "mlp-tokens", alora(lora_bias=True), inputs=OFFSETS),
    Row("conv1d-hf/plain", "gpt", alora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core",
        inputs=OFFSETS),
]


def other(on):
    return {"run": lambda site, t, c, x, inputs: run(site, t, c, x, inputs, on)}


FAULTS = (
    Fault("counted-from-the-start", "the offsets count from the first token", other(counted_from_the_start),
          caught_by=("forward",)),
    Fault("one-token-late", "the first token of the invocation is left out", other(one_token_late),
          caught_by=("forward",)),
    Fault("every-token", "it acts on all tokens, as LoRA does", other(everywhere), caught_by=("forward",)),
    Fault("first-invocation", "it begins where it was invoked first",
          {"run": partial(run, found=partial(last_invocation, which=0))}, ("usage",), ("usage/invocation",)),
)

METHOD = Method(
    name="alora", peft_type="LORA", title="aLoRA", paper="https://arxiv.org/abs/2504.12397",
    equation="y_t = W x_t + b + s B A x_t from the invocation on", rows=ROWS, shapes=LoRA.shapes, run=run,
    faults=FAULTS, merges=False,
    tensors=Tensors(neutral={"lora_B.weight": 0.0, "lora_B.bias": 0.0}),
    laws=Laws(draw={"alora_invocation_tokens": [[5, 9]], "r": [1, 2, 5], "lora_alpha": [1, 3, 8],
                    "target_modules": [["up", "mid"]]}, inputs=OFFSETS, mixed_batch=True, stacks=False, scales=True),
)
