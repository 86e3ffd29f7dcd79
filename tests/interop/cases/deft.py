"""DEFT: part of the weight's output space replaced; PaRa: removed."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("deft", "DeftConfig", r=3, exact_init=False, tolerance=2e-5)  # peft computes in float32 whatever the dtype


def deft(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    deft("linear/plain", B.MLP, LINEARS, second={"r": 2}),
    deft("linear/qr", B.MLP, LINEARS, decomposition_method="qr"),
    deft("linear/rank_above_outputs", B.MLP_2D, LINEARS, r=6, decomposition_method="qr"),
    deft("linear/alpha", B.MLP, LINEARS, alpha=5),
    deft("linear/para", B.MLP, LINEARS, para=True, fresh=False),
    deft("linear/para_qr", B.MLP_2D, LINEARS, para=True, decomposition_method="qr", fresh=False),
    deft("linear/init_false", B.MLP, LINEARS, init_weights=False, init_scale=3.0, fresh=False),
    deft("linear/dropout", B.MLP, LINEARS, deft_dropout=0.4, train=True),
    deft("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    deft("linear/bias_deft_only", B.MLP, LINEARS, bias="deft_only", **trained_bias()),
    deft("hf_conv1d/qr", B.HF_CONV1D, LINEARS, decomposition_method="qr", fan_in_fan_out=True),
    deft("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    deft("gpt2/plain", B.GPT2, None, fan_in_fan_out=True, task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("deft/refused/method", "DeftConfig", {"target_modules": ["wide"], "decomposition_method": "svd"}, B.MLP,
            "inject", "ValueError"),
    Refused("deft/refused/conv2d", "DeftConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "TypeError"),
]
