"""Multitask prompt tuning: Wang et al., 2023, https://arxiv.org/abs/2303.02861: one prompt, scaled for each task."""

import json
from pathlib import Path

import numpy as np

from .. import store
from ..method import Fault, Laws, Method, Prompt, Row, Tensors

KEY, COLS, ROWS_OF = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
DIM = 8  # of the language models


def shared(c, sites):
    both = 2 if c["task_type"] == "SEQ_2_SEQ_LM" else 1  # vectors for the encoder, then as many for the decoder
    n, tasks, r = both * c["num_virtual_tokens"], c["num_tasks"], c["num_ranks"]
    return {KEY: (n, DIM), COLS: (tasks, n, r), ROWS_OF: (tasks, r, DIM)}


def scale(t, tasks):
    """U_k V_k for each sample's task k: (batch, tokens, dim)."""
    return t[COLS][tasks] @ t[ROWS_OF][tasks]


def prompt(t, c, inputs, joined=lambda P, S: P * S, tasks=lambda k: k, swapped=False):
    vectors, n = joined(t[KEY], scale(t, tasks(inputs["task_ids"]))), c["num_virtual_tokens"]
    halves = [vectors[:, :n], vectors[:, n:]]
    if swapped:
        halves.reverse()
    return {"tokens": halves[0], **({"decoder_tokens": halves[1]} if c["task_type"] == "SEQ_2_SEQ_LM" else {})}


SOURCE = {"prompt_tuning_init_state_dict_path": "adapters/multitask/adapter_model.safetensors"}


def files(folder):
    """Write the prompt of three tasks that others begin with."""
    from safetensors.numpy import save_file

    from ..draw import bf16, rng_of

    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "inference_mode": True, **tuning(3), "num_tasks": 3}
    rng, shapes = rng_of("multitask"), shared(config, [])
    tensors = {k: bf16(rng.normal(size=shape)).astype(np.float32) for k, shape in shapes.items()}
    place = Path(folder, SOURCE["prompt_tuning_init_state_dict_path"])
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place)
    place.with_name("adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def made(c, sites):
    """What a prompt begins with that begins with another: its vectors, and a task's matrix or the mean of all."""
    how = c.get("prompt_tuning_init", "RANDOM")
    if how == "RANDOM":
        return {}
    from safetensors.numpy import load_file

    source = load_file(store.folder() / c["prompt_tuning_init_state_dict_path"])
    if how == "ONLY_SOURCE_SHARED":
        return {KEY: source[KEY]}
    task = c.get("prompt_tuning_init_task", 0)
    of = (lambda t: t[task]) if how == "EXACT_SOURCE_TASK" else (lambda t: np.asarray(t, np.float64).mean(0))
    return {KEY: source[KEY], COLS: of(source[COLS])[None], ROWS_OF: of(source[ROWS_OF])[None]}


def first_task(o, right, name, config):
    right(name, {**config, "prompt_tuning_init_task": 0})
    o.adapters[name] = (config, o.adapters[name][1])


def wrong(**how):
    return {"prompt": lambda t, c, inputs: prompt(t, c, inputs, **how)}


def tuning(n, task="CAUSAL_LM", **more):
    return {"task_type": task, "num_virtual_tokens": n, "num_tasks": 4, "num_ranks": 2, **more}


def begun(how, **more):
    return {**tuning(3), "num_tasks": 1, "prompt_tuning_init": how, **SOURCE, **more}


TASKS = {"task_ids": {"values": [3, 1]}}
TASK = {"task_ids": {"values": [0, 0]}}
MASK = {"attention_mask": {"values": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}}
ROWS = [
    Row("causal-lm/plain", "causal-lm", tuning(3), "core", inputs=TASKS, second={}),
    Row("causal-lm/one-rank", "causal-lm", tuning(4, num_ranks=1), inputs=TASKS, dtypes=("float64", "float32")),
    Row("causal-lm/loss", "causal-lm", tuning(3), inputs={**TASKS, "labels": [[2, 5], 13]}),
    Row("causal-lm/from-one-task", "causal-lm", begun("EXACT_SOURCE_TASK", prompt_tuning_init_task=2), "core",
        inputs=TASK, begins=True),
    Row("causal-lm/from-the-mean", "causal-lm", begun("AVERAGE_SOURCE_TASKS"), inputs=TASK, begins=True),
    Row("causal-lm/from-the-shared", "causal-lm", begun("ONLY_SOURCE_SHARED"), inputs=TASK, begins=True),
    Row("encoder/sequence", "encoder-sequence", tuning(2, "SEQ_CLS"), inputs={**TASKS, **MASK}),
    # the reference raises if it is given a decoder's input
    Row("encoder-decoder/loss", "encoder-decoder", tuning(3, "SEQ_2_SEQ_LM"), "core",
        inputs={**TASKS, "labels": [[2, 4], 13]}),
]

BEGUN = tuple(row.id for row in ROWS if row.begins)
FAULTS = (
    Fault("one-task-for-all", "every sample gets the first sample's task", wrong(tasks=lambda k: np.full_like(k, k[0])),
          caught_by=("forward",), spares=BEGUN),
    Fault("added", "the task's matrix is added to the prompt, not multiplied", wrong(joined=lambda P, S: P + S),
          caught_by=("forward",)),
    Fault("tasks-shifted", "tasks are counted from one", wrong(tasks=lambda k: k - 1), caught_by=("forward",),
          spares=BEGUN),
    Fault("halves-exchanged", "the decoder's vectors stand before the encoder's input", wrong(swapped=True),
          caught_by=("forward",), cases=("encoder-decoder/loss",)),
    Fault("begun-with-the-first-task", "a prompt that begins with one task's matrix takes the first task's",
          {"add": first_task}, caught_by=("keys",), cases=("causal-lm/from-one-task",)),
)

METHOD = Method(
    name="multitask_prompt_tuning", peft_type="MULTITASK_PROMPT_TUNING", title="Multitask prompt tuning",
    paper="https://arxiv.org/abs/2303.02861", equation="x' = [P * (U_k V_k); E(x)]", rows=ROWS,
    shapes=lambda site, c: {}, files=files, faults=FAULTS, merges=False,
    tensors=Tensors(shared=shared, made=made, perturb=lambda key, fresh, rng: rng.normal(size=fresh.shape)),
    prompt=Prompt(formula=prompt),
    laws=Laws(draw={"num_virtual_tokens": [1, 2, 5], "num_tasks": [4], "num_ranks": [1, 3],
                    "task_type": ["CAUSAL_LM"]}, stacks=False, inputs=TASKS, bases=("causal-lm",)),
)
