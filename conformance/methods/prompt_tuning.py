"""Prompt tuning: Lester et al., 2021, https://arxiv.org/abs/2104.08691: trained vectors before the embedded input."""

from ..method import Fault, Method, Row

KEY = "prompt_embeddings"


def shared(c, sites, dim=8):
    return {KEY: (c["num_virtual_tokens"], dim)}


def prompt(t, c):
    return {"tokens": t[KEY]} if KEY in t else {}


def tuning(n, **more):
    return {"task_type": "CAUSAL_LM", "num_virtual_tokens": n, **more}


ROWS = [
    Row("causal-lm/plain", "causal-lm", tuning(3), "core", second={}),
    Row("causal-lm/one-token", "causal-lm", tuning(1)),
    Row("causal-lm/sample-vocab", "causal-lm", tuning(4, prompt_tuning_init="SAMPLE_VOCAB")),
]

FAULTS = (
    Fault("reversed", "the virtual tokens stand in reverse order",
          {"prompt": lambda t, c: {"tokens": t[KEY][::-1]} if KEY in t else {}}, caught_by=("forward",),
          spares=("causal-lm/one-token",)),
    Fault("last-token-dropped", "the last virtual token repeats the first",
          {"prompt": lambda t, c: {"tokens": t[KEY][[*range(len(t[KEY]) - 1), 0]]} if KEY in t else {}},
          caught_by=("forward",), spares=("causal-lm/one-token",)),
)

METHOD = Method(
    name="prompt_tuning", peft_type="PROMPT_TUNING", title="Prompt tuning", paper="https://arxiv.org/abs/2104.08691",
    equation="x' = [P; E(x)]", rows=ROWS, shapes=lambda site, c: {}, shared=shared, prompt=prompt, faults=FAULTS,
    merges=False, stacks=False, draw={"num_virtual_tokens": [1, 2, 5], "task_type": ["CAUSAL_LM"]},
    draw_bases=("causal-lm",), prompts=True,
)
