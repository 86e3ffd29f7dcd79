"""Lily: A shared by layers after each other, a router's mixture of B shared by all."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
ALONE = {"second": None}  # peft shares tensors for the adapter that a model is made with, not for those added later
_row = rows("lily", "LilyConfig", r=3, merges=False, mixed=None)


def lily(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    lily("linear/plain", B.MLP, LINEARS, second={"r": 2}),
    lily("linear/2d", B.MLP_2D, LINEARS, num_B=4, scaling=0.5),
    lily("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    lily("stack/shared", B.STACK, ["q", "up"], stride_A=2, num_B=3, **ALONE),
    lily("stack/one_name_two_shapes", B.STACK, ["q", "up", "down"], stride_A=4, **ALONE),
    lily("stack/pattern", B.STACK, r".*\.(q|up)", stride_A=2, **ALONE),
    lily("targets/modules_to_save", B.STACK, ["q", "up"], stride_A=2, modules_to_save=["head"], stacks=False, **ALONE),
    lily("targets/layers_to_transform", B.LLAMA, ["q_proj", "v_proj"], layers_to_transform=[0, 1], stride_A=2,
         **ALONE),
    lily("llama/plain", B.LLAMA, None, stride_A=2, task_type="CAUSAL_LM", **ALONE),
]

REFUSED = [
    Refused("lily/refused/one_b", "LilyConfig", {"target_modules": ["wide"], "num_B": 1}, B.MLP, "inject",
            "ValueError"),
    Refused("lily/refused/stride", "LilyConfig", {"target_modules": ["wide"], "stride_A": 0}, B.MLP, "inject",
            "ValueError"),
    Refused("lily/refused/merge", "LilyConfig", {"target_modules": ["wide"], "r": 3}, B.MLP, "merge",
            "NotImplementedError"),
    Refused("lily/refused/conv2d", "LilyConfig", {"target_modules": ["first"], "r": 2}, B.CONV2D, "inject",
            "NotImplementedError"),
]
