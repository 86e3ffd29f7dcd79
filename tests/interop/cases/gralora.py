"""GraLoRA: a low-rank pair for each block of the weight."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("gralora", "GraloraConfig", r=4, alpha=6)


def gralora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    gralora("linear/plain", B.MLP, LINEARS, second={"r": 2}),
    gralora("linear/2d", B.MLP_2D, LINEARS, hybrid_r=2),
    gralora("linear/four", B.MLP, LINEARS, gralora_k=4),
    gralora("linear/one", B.MLP, LINEARS, gralora_k=1, r=3),
    gralora("linear/hybrid", B.MLP, LINEARS, hybrid_r=3),
    gralora("linear/init_false", B.MLP, LINEARS, init_weights=False, hybrid_r=2, fresh=False),
    gralora("linear/dropout", B.MLP, LINEARS, gralora_dropout=0.4, hybrid_r=2, train=True),
    gralora("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    gralora("linear/bias_gralora_only", B.MLP, LINEARS, bias="gralora_only", **trained_bias()),
    gralora("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    gralora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True, hybrid_r=2),
    gralora("llama/default", B.LLAMA, None, task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("gralora/refused/rank", "GraloraConfig", {"target_modules": ["wide"], "r": 3}, B.MLP, "inject",
            "ValueError"),
    Refused("gralora/refused/blocks", "GraloraConfig", {"target_modules": ["wide"], "r": 3, "gralora_k": 3}, B.MLP,
            "inject", "ValueError"),
    Refused("gralora/refused/conv2d", "GraloraConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "TypeError"),
]
