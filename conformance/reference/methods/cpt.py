"""CPT: Blau et al., 2024, https://arxiv.org/abs/2410.17222: examples in front of the input, their embeddings trained.

Training is projected gradient descent: after every step the change of a token is cut to a length that its type allows,
so gradients are those at the cut change. Labels among the examples are never changed, and count in the loss.
"""

import numpy as np

from ..method import Fault, Laws, Method, Prompt, Row, Tensors
from ..numpy_model import NO_LABEL, softmax

KEY, LIVE = "prompt_embeddings", "prompt_encoder.default."
EMBEDDING, DELTA = LIVE + "embedding.weight", LIVE + "delta_embedding.weight"
DIM = 8  # of the language models
SMALLEST = 1e-10  # how long the reference lets the change of a label be


def lengths(c):
    """The longest change of each token, eq. 6: by its type, relative to a model of 2048 dimensions."""
    kinds = np.array(c["cpt_tokens_type_mask"]) % 4
    by_kind = np.array([SMALLEST, c["opt_projection_format_epsilon"], c["opt_projection_epsilon"],
                        c["opt_projection_format_epsilon"]])
    return by_kind[kinds] * np.where(kinds == 0, 1, np.sqrt(DIM / 2048))


def cut(delta, c, lengths=lengths):
    norm = np.linalg.norm(delta, axis=1)
    return delta * np.minimum(1, lengths(c) / norm)[:, None]


def vectors(t, c, held=None, cut=cut):
    if KEY in t:
        return t[KEY]
    here = (t if held is None else held)[DELTA]
    step = (t[DELTA] - here) * (np.array(c["cpt_tokens_type_mask"]) % 4 != 0)[:, None]
    return t[EMBEDDING] + cut(here, c) + step


def prompt(t, c, held=None):
    return {"tokens": vectors(t, c, held)}


def loss(logits, inputs, c, decays=True, of_examples=True):
    """Over the labels of the examples and of the input. With decay, each example counts less than the next one."""
    own, ids = np.array(c["cpt_tokens_type_mask"]), np.array(c["cpt_token_ids"])
    given = inputs.get("input_type_mask", np.full_like(inputs["labels"], 4))
    total, count = 0.0, 0
    for row, labels, kinds in zip(logits, inputs["labels"], given):
        kinds = np.concatenate([own, np.where(kinds > 0, kinds + own.max(), 0)])
        labels = np.concatenate([ids, labels])
        counted = (kinds > 0) & (kinds % 4 == 0) & (labels != NO_LABEL)
        counted[0] = False  # nothing predicts the first token
        if not of_examples:
            counted[: len(own)] = False
        examples = sorted(set(kinds[1:][(kinds[1:] > 0) & (kinds[1:] % 4 == 0)]), reverse=True)
        for at in np.flatnonzero(counted):
            weight = 1.0
            if decays and c.get("opt_weighted_loss_type") == "decay":
                weight = c["opt_loss_decay_factor"] ** examples.index(kinds[at])
            total -= weight * np.log(softmax(row[at - 1])[labels[at]])
            count += 1
    return total / count


def cpt(**more):
    return {"task_type": "CAUSAL_LM", "cpt_token_ids": [4, 9, 6, 11, 4, 2, 6, 8],
            "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8], "opt_projection_epsilon": 16.0,
            "opt_projection_format_epsilon": 8.0, **more}


def wrong(cut):
    return {"prompt": lambda t, c, held=None: {"tokens": vectors(t, c, held, cut)}}


LABELS = {"labels": [[2, 5], 13]}
TYPES = {"input_type_mask": {"values": [[1, 2, 3, 4, 4], [1, 2, 2, 3, 4]]}}
LOADED, LOSSES = ("causal-lm/loaded",), ("causal-lm/loss", "causal-lm/decay")
ROWS = [
    Row("causal-lm/loaded", "causal-lm", cpt(inference_mode=True), "core", second={}),
    Row("causal-lm/plain", "causal-lm", cpt(), "core", live=True),
    Row("causal-lm/loss", "causal-lm", cpt(), "core", live=True, inputs=LABELS),
    Row("causal-lm/decay", "causal-lm", cpt(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5), live=True,
        inputs={**LABELS, **TYPES}),
]

FAULTS = (
    Fault("not-cut", "changes are as long as they are", wrong(lambda delta, c: delta), caught_by=("forward",),
          spares=LOADED),
    Fault("one-length-for-all", "templates may change as much as inputs",
          wrong(lambda delta, c: cut(delta, {**c, "opt_projection_format_epsilon": c["opt_projection_epsilon"]})),
          caught_by=("forward",), spares=LOADED),
    Fault("labels-changed", "labels among the examples may change as much as inputs",
          wrong(lambda delta, c: cut(delta, c, lambda c: np.maximum(lengths(c), 1))), caught_by=("forward",),
          spares=LOADED),
    Fault("no-decay", "all examples count the same", {"loss": lambda y, i, c: loss(y, i, c, decays=False)},
          caught_by=("forward",), cases=("causal-lm/decay",)),
    Fault("examples-without-loss", "labels among the examples do not count",
          {"loss": lambda y, i, c: loss(y, i, c, of_examples=False)}, caught_by=("forward",), cases=LOSSES),
)

METHOD = Method(
    name="cpt", peft_type="CPT", title="CPT", paper="https://arxiv.org/abs/2410.17222",
    equation="x' = [E(examples) + D; E(x)], |D_i| <= e_i", rows=ROWS, shapes=lambda site, c: {}, faults=FAULTS,
    merges=False,
    tensors=Tensors(shared=lambda c, sites: {KEY: (len(c["cpt_token_ids"]), DIM)}, frozen=("embedding.weight",),
                    perturb=lambda key, fresh, rng: rng.normal(size=fresh.shape) * (0.4 if "delta" in key else 1)),
    prompt=Prompt(formula=prompt, live=lambda c: dict.fromkeys((EMBEDDING, DELTA), (len(c["cpt_token_ids"]), DIM)),
                  saved=lambda t, c: {KEY: vectors(t, c)}, loss=loss),
    laws=Laws(draw={"task_type": ["CAUSAL_LM"], "cpt_token_ids": [[4, 9, 6], [5]], "inference_mode": [True]},
              stacks=False, bases=("causal-lm",)),
)
