"""Prompt tuning: Lester et al., 2021, https://arxiv.org/abs/2104.08691: trained vectors before the embedded input."""

import numpy as np

from ..bases import TYPES
from ..method import Fault, Laws, Method, Prompt, Row, Tensors
from .lora import without_types

KEY = "prompt_embeddings"


def shared(c, sites, dim=8):
    """Encoder-decoders have vectors for both stacks, and use the first half."""
    return {KEY: (c["num_virtual_tokens"] * (2 if c["task_type"] == "SEQ_2_SEQ_LM" else 1), dim)}


def prompt(t, c, of=lambda P: P):
    return {"tokens": of(t[KEY][: c["num_virtual_tokens"]])} if KEY in t else {}


def tuning(n, task="CAUSAL_LM", **more):
    return {"task_type": task, "num_virtual_tokens": n, **more}


def wrong(of):
    return {"prompt": lambda t, c: prompt(t, c, of)}


def generate_after_first(o, right, inputs, count):
    """The prompt is there for the first new token alone."""
    ids = right(inputs, 1)
    mask = {k: np.pad(v, [(0, 0), (0, 1)], constant_values=1) for k, v in inputs.items() if k == "attention_mask"}
    o.disable(True)
    return right({**inputs, **mask, "input_ids": ids}, count - 1)


FIRST_TOKEN = Fault("first-token-only", "only the first new token is generated with the prompt",
                    {"generate": generate_after_first}, caught_by=("usage",), cases=("usage/generate-masked",))


MASK = {"attention_mask": {"values": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}}
LATER = {"decoder_input_ids": [[2, 4], 13], "decoder_attention_mask": {"values": [[1, 1, 1, 1], [1, 1, 0, 0]]}}

ROWS = [
    Row("causal-lm/plain", "causal-lm", tuning(3), "core", second={}),
    Row("causal-lm/one-token", "causal-lm", tuning(1)),
    Row("causal-lm/sample-vocab", "causal-lm", tuning(4, prompt_tuning_init="SAMPLE_VOCAB")),
    Row("causal-lm/masked", "causal-lm", tuning(3), inputs=MASK),
    Row("causal-lm/loss", "causal-lm", tuning(3), inputs={"labels": [[2, 5], 13]}),
    Row("encoder/features", "encoder", tuning(3, "FEATURE_EXTRACTION"), inputs=MASK),
    Row("encoder/sequence", "encoder-sequence", tuning(3, "SEQ_CLS"), "core", inputs=MASK),
    Row("encoder/sequence-loss", "encoder-sequence", tuning(3, "SEQ_CLS"), inputs={"labels": [[2], 3]}),
    Row("encoder/token-types", "encoder-types", tuning(3, "SEQ_CLS"), inputs={**MASK, **TYPES}),
    Row("encoder/token-types-dropped", "encoder-types-features", tuning(3, "FEATURE_EXTRACTION"),
        inputs={**MASK, **TYPES}, note="the reference passes no types on for this task"),
    Row("encoder/tokens", "encoder-tokens", tuning(3, "TOKEN_CLS"), inputs=MASK),
    Row("encoder/answers", "encoder-answers", tuning(3, "QUESTION_ANS"), inputs=MASK),
    Row("encoder-decoder/plain", "encoder-decoder", tuning(3, "SEQ_2_SEQ_LM"), "core", inputs={**MASK, **LATER}),
    Row("encoder-decoder/loss", "encoder-decoder", tuning(3, "SEQ_2_SEQ_LM"), inputs={"labels": [[2, 4], 13]}),
]

def head_stays(o, right, names, for_use=False):
    """Switching leaves the first adapter's head where it is."""
    head = {k: v for k, v in o.adapters["default"][1].items() if not k.startswith("prompt")}
    for name in names:
        config, tensors = o.adapters[name]
        o.adapters[name] = config, {**tensors, **head}
    right(names, for_use)


FAULTS = (
    FIRST_TOKEN,
    Fault("head-stays", "another prompt is run with the head of the first", {"switch": head_stays},
          caught_by=("usage",), cases=("usage/with-its-head",)),
    Fault("in-16-bits", "on a base in 16 bits a prompt has 16 bits", {"cast": lambda o, right, dtype, options: dtype},
          caught_by=("usage",), cases=("usage/prompt-dtypes",)),
    Fault("token-types-lost", "token_type_ids do not reach the model", {"forward": without_types},
          caught_by=("forward",), cases=("encoder/token-types",)),
    Fault("reversed", "the virtual tokens stand in reverse order",
          wrong(lambda P: P[::-1]), caught_by=("forward",), spares=("causal-lm/one-token",)),
    Fault("last-token-dropped", "the last virtual token repeats the first",
          wrong(lambda P: P[[*range(len(P) - 1), 0]]), caught_by=("forward",), spares=("causal-lm/one-token",)),
    Fault("second-half", "an encoder-decoder is given the second half of the vectors",
          {"prompt": lambda t, c: {"tokens": t[KEY][c["num_virtual_tokens"]:]}}, caught_by=("forward",),
          cases=("encoder-decoder/plain",)),
)

METHOD = Method(
    name="prompt_tuning", peft_type="PROMPT_TUNING", title="Prompt tuning", paper="https://arxiv.org/abs/2104.08691",
    equation="x' = [P; E(x)]", rows=ROWS, shapes=lambda site, c: {}, faults=FAULTS, merges=False,
    tensors=Tensors(shared=shared),
    prompt=Prompt(formula=prompt),
    laws=Laws(draw={"num_virtual_tokens": [1, 2, 5], "task_type": ["CAUSAL_LM"]}, stacks=False, bases=("causal-lm",)),
)
