"""Poly: Ponti et al., 2023, https://arxiv.org/abs/2202.13914; n_splits > 1 is MHR: https://arxiv.org/abs/2211.03831."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from ..numpy_model import apply_layer

EXACT = ("float64", "float32")  # language models are compared in these
EPSILON = 1e-12  # the reference adds it to the sum
A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


def shapes(site, c):
    q, s, r = c.get("n_splits", 1), c.get("n_skills", 4), c.get("r", 8)
    return {A: (q, s, site.inp // q, r), B: (q, s, r, site.out // q), LOGITS: (c.get("n_tasks", 1), q * s)}


def mix(t, c, tasks):
    """Each sample's weights over skills, (batch, splits, skills), summing to one over skills."""
    q, s = t[A].shape[:2]
    z = 1 / (1 + np.exp(-t[LOGITS][tasks].reshape(-1, q, s)))
    return z / (z.sum(-1, keepdims=True) + EPSILON)


def run(site, t, c, x, inputs, mix=mix, divide=True):
    w = mix(t, c, inputs["task_ids"])
    a = np.einsum("bqs,qsir->bqir", w, t[A]).reshape(len(w), site.inp, -1)
    b = np.einsum("bqs,qsro->brqo", w, t[B]).reshape(len(w), -1, site.out)
    return apply_layer(site, x) + x @ a @ b / (c.get("r", 8) if divide else 1)


def first_task(t, c, tasks):
    return mix(t, c, np.zeros_like(tasks))


def softmaxed(t, c, tasks):
    q, s = t[A].shape[:2]
    z = np.exp(t[LOGITS][tasks].reshape(-1, q, s))
    return z / z.sum(-1, keepdims=True)


def poly(**more):
    return {"r": 3, "n_tasks": 4, "n_skills": 3, "n_splits": 1, "target_modules": ["up", "mid"], **more}


TASKS = {"task_ids": [[3], 4]}
TEXT_TASKS = {"task_ids": [[2], 4], "attention_mask": {"values": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}}


def task(kind, **more):
    return poly(target_modules=["q_proj", "v_proj", "mlp"], task_type=kind, **more)


ROWS = [
    Row("linear/plain", "mlp-tokens", poly(), "core", inputs=TASKS, second={}),
    Row("linear/splits", "mlp-tokens", poly(n_splits=2, r=2), "core", inputs=TASKS),
    Row("linear/two-skills", "mlp-tokens", poly(n_skills=2, r=1), inputs=TASKS),
    Row("causal-lm/tasks", "causal-lm", task("CAUSAL_LM", r=2), dtypes=EXACT, inputs=TEXT_TASKS),
    Row("encoder/features", "encoder", task("FEATURE_EXTRACTION"), dtypes=EXACT, inputs=TEXT_TASKS),
    Row("encoder/sequence", "encoder-sequence", task("SEQ_CLS"), dtypes=EXACT, inputs=TEXT_TASKS),
    Row("encoder/tokens", "encoder-tokens", task("TOKEN_CLS"), dtypes=EXACT, inputs=TEXT_TASKS),
    Row("encoder/answers", "encoder-answers", task("QUESTION_ANS"), dtypes=EXACT, inputs=TEXT_TASKS),
    Row("encoder-decoder/plain", "encoder-decoder", task("SEQ_2_SEQ_LM"), dtypes=EXACT, inputs={
        **TEXT_TASKS, "decoder_input_ids": [[2, 4], 13]}),
]

FAULTS = (
    Fault("one-task-for-all", "every sample gets the first task's skills",
          {"run": lambda s, t, c, x, i: run(s, t, c, x, i, mix=first_task)}, caught_by=("forward",)),
    Fault("softmax", "skills are mixed by softmax, not by normalised sigmoids",
          {"run": lambda s, t, c, x, i: run(s, t, c, x, i, mix=softmaxed)}, caught_by=("forward",)),
    Fault("not-over-r", "the sum is not divided by r", {"run": lambda s, t, c, x, i: run(s, t, c, x, i, divide=False)},
          caught_by=("forward",), spares=("linear/two-skills",)),
)

METHOD = Method(
    name="poly", peft_type="POLY", title="Poly", paper="https://arxiv.org/abs/2202.13914",
    equation="y = W x + (1 / r) B(task) A(task) x", rows=ROWS, shapes=shapes, run=run, faults=FAULTS, merges=False,
    tensors=Tensors(neutral={B: 0.0}),
    laws=Laws(draw={"r": [1, 2], "n_tasks": [4], "n_skills": [2, 3], "target_modules": [["up", "mid"]]},
              mixed_batch=True, inputs=TASKS, stacks=False),
)
