"""BEFT: a learned vector added to the outputs."""

from .. import bases as B
from .case import Refused, rows

_row = rows("beft", "BeftConfig", target_modules=["square", "wide"])

CASES = [
    _row("linear/plain", B.MLP),
    _row("linear/2d", B.MLP_2D),
    _row("linear/no_bias", B.MLP, target_modules=["thin"], merges=False),
    _row("linear/init_false", B.MLP, init_weights=False, fresh=False),
    _row("targets/modules_to_save", B.STACK, target_modules=["q", "up"], modules_to_save=["head"], stacks=False),
    _row("targets/all_linear", B.STACK, target_modules="all-linear", merges=False),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["value"], task_type="SEQ_CLS", stacks=False),
    _row("t5/default", B.T5, target_modules=None, task_type="SEQ_2_SEQ_LM", merges=False),
]

REFUSED = [
    Refused("beft/refused/no_bias", "BeftConfig", {"target_modules": ["thin"]}, B.MLP, "merge", "ValueError"),
    Refused("beft/refused/conv2d", "BeftConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "TypeError"),
    Refused("beft/refused/hf_conv1d", "BeftConfig", {"target_modules": ["wide"]}, B.HF_CONV1D, "inject", "TypeError"),
]
