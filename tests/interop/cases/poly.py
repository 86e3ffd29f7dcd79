"""Poly: skills mixed per task; the forward pass takes task_ids."""

import torch

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
TASKS = {"task_ids": torch.tensor([0, 2, 1, 2])}
ONE_TASK = {"task_ids": torch.zeros(B.BATCH, dtype=torch.long)}
_row = rows("poly", "PolyConfig", r=3, n_tasks=3, n_skills=4, inputs=TASKS, merges=False)


def poly(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    poly("linear/plain", B.MLP, LINEARS),
    poly("linear/splits", B.MLP, LINEARS, n_splits=2),
    poly("linear/one_task", B.MLP, LINEARS, n_tasks=1, n_skills=2, inputs=ONE_TASK),
    poly("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    poly("linear/random_while_training", B.MLP, LINEARS, train=True),
    poly("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    poly("targets/exclude", B.STACK, ["q"], exclude_modules=["layers.1.q"]),
    poly("t5/plain", B.T5, ["q", "v"], task_type="SEQ_2_SEQ_LM"),
]

REFUSED = [
    Refused("poly/refused/conv2d", "PolyConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "TypeError"),
    Refused("poly/refused/embedding", "PolyConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject", "TypeError"),
    Refused("poly/refused/hf_conv1d", "PolyConfig", {"target_modules": ["wide"]}, B.HF_CONV1D, "inject", "TypeError"),
    Refused("poly/refused/merge", "PolyConfig", {"target_modules": ["wide"]}, B.MLP, "merge", "NotImplementedError",
            inputs=ONE_TASK),
    Refused("poly/refused/no_tasks", "PolyConfig", {"target_modules": ["wide"]}, B.MLP, "run", "ValueError"),
]
