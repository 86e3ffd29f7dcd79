"""AdaMSS: rows of W sorted into subspaces, a low-rank change in each (test_schedules.py does the steps)."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
_row = rows("adamss", "AdamssConfig", r=3, num_subspaces=3, own_buffers=True)


def adamss(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    adamss("linear/plain", B.MLP, LINEARS, second={"r": 4, "num_subspaces": 2}),
    adamss("linear/2d", B.MLP_2D, LINEARS, r=5, subspace_rank=2),
    adamss("linear/one_subspace", B.MLP, LINEARS, num_subspaces=1, subspace_rank=3),
    adamss("linear/rank_above_rows", B.MLP, LINEARS, num_subspaces=4, subspace_rank=3),
    adamss("linear/dynamic", B.MLP, LINEARS, r=4, num_subspaces=2, subspace_rank=3, use_dynamic_rank=True,
           svd_threshold=0.5),
    adamss("linear/init_none", B.MLP, LINEARS, init_weights=None, fresh=False),
    adamss("linear/seed", B.MLP, LINEARS, r=2, random_seed=7),
    adamss("linear/asa", B.MLP, LINEARS, subspace_rank=2, use_asa=True, asa_target_subspaces=3, init_warmup=1,
           final_warmup=9, mask_interval=2),
    adamss("linear/asa_linear", B.MLP, LINEARS, num_subspaces=4, use_asa=True, asa_target_subspaces=4, init_warmup=0,
           final_warmup=11, mask_interval=3, asa_schedule_exponent=1.0, asa_importance_beta=0.5,
           asa_uncertainty_beta=0.7),
    adamss("targets/layers_to_transform", B.LLAMA, ["q_proj"], layers_to_transform=[1]),
    adamss("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    adamss("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", stacks=False),
    adamss("llama/default", B.LLAMA, None, task_type="CAUSAL_LM"),
]

_ASA = {"target_modules": ["wide"], "use_asa": True}
REFUSED = [
    Refused("adamss/refused/conv2d", "AdamssConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "TypeError"),
    Refused("adamss/refused/embedding", "AdamssConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject",
            "TypeError"),
    Refused("adamss/refused/init", "AdamssConfig", {"target_modules": ["wide"], "init_weights": "zero"}, B.MLP,
            "inject", "ValueError"),
    Refused("adamss/refused/interval", "AdamssConfig", {**_ASA, "mask_interval": 0}, B.MLP, "inject", "ValueError"),
    Refused("adamss/refused/no_ramp", "AdamssConfig", {**_ASA, "init_warmup": 9, "final_warmup": 9}, B.MLP, "inject",
            "ValueError"),
    Refused("adamss/refused/target", "AdamssConfig", {**_ASA, "asa_target_subspaces": 0}, B.MLP, "inject",
            "ValueError"),
    Refused("adamss/refused/exponent", "AdamssConfig", {**_ASA, "asa_schedule_exponent": 0.0}, B.MLP, "inject",
            "ValueError"),
]
