"""MiSS: one shard, repeated along the weight; its variants "mini" and "bat"."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("miss", "MissConfig", r=4)


def miss(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    miss("linear/plain", B.MLP, LINEARS, second={"r": 2}),
    miss("linear/2d", B.MLP_2D, LINEARS),
    miss("linear/uneven", B.MLP, LINEARS, r=3),
    miss("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    miss("linear/dropout", B.MLP, LINEARS, r=3, miss_dropout=0.4, train=True),
    miss("linear/mini", B.MLP, LINEARS, r=3, init_weights="mini", mini_r=2),
    miss("linear/bat", B.MLP, LINEARS, init_weights="bat"),
    miss("linear/bat_2d", B.MLP_2D, LINEARS, r=2, init_weights="bat"),
    miss("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    miss("linear/bias_miss_only", B.MLP, LINEARS, bias="MiSS_only", **trained_bias()),
    miss("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    miss("targets/layers_to_transform", B.LLAMA, ["q_proj"], layers_to_transform=[1]),
    miss("llama/bat", B.LLAMA, None, init_weights="bat", task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("miss/refused/bat_uneven", "MissConfig", {"target_modules": ["wide"], "r": 3, "init_weights": "bat"}, B.MLP,
            "inject", "ValueError"),
    Refused("miss/refused/mini_uneven", "MissConfig",
            {"target_modules": ["wide"], "r": 3, "init_weights": "mini", "mini_r": 5}, B.MLP, "inject", "ValueError"),
    Refused("miss/refused/rank_above_inputs", "MissConfig", {"target_modules": ["wide"], "r": 9}, B.MLP, "inject",
            "ValueError"),
    Refused("miss/refused/conv2d", "MissConfig", {"target_modules": ["first"], "r": 2}, B.CONV2D, "inject",
            "TypeError"),
]
