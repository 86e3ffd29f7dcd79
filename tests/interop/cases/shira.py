"""SHiRA: single entries of the weight trained, chosen by a mask."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
_row = rows("shira", "ShiraConfig", r=2, target_modules=LINEARS, own_buffers=True)

CASES = [
    _row("linear/plain", B.MLP),
    _row("linear/2d", B.MLP_2D),
    _row("linear/seed", B.MLP, random_seed=5),
    _row("linear/init_false", B.MLP, init_weights=False, fresh=False),
    _row("linear/second_seed", B.MLP, second={"random_seed": 7, "r": 1}),
    _row("linear/fan_in_fan_out_corrected", B.MLP, fan_in_fan_out=True),
    _row("targets/modules_to_save", B.STACK, target_modules=["q", "up"], modules_to_save=["head"], stacks=False),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["query", "value"], task_type="SEQ_CLS", stacks=False),
    _row("llama/plain", B.LLAMA, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("shira/refused/r", "ShiraConfig", {"target_modules": LINEARS, "r": 0}, B.MLP, "inject", "ValueError"),
    Refused("shira/refused/more_than_all", "ShiraConfig", {"target_modules": LINEARS, "r": 5}, B.MLP, "inject",
            "ValueError"),
    Refused("shira/refused/conv2d", "ShiraConfig", {"target_modules": ["first"], "r": 2}, B.CONV2D, "inject",
            "TypeError"),
    Refused("shira/refused/hf_conv1d", "ShiraConfig", {"target_modules": ["wide"], "r": 2}, B.HF_CONV1D, "inject",
            "TypeError"),
]
