"""DeLoRA: low-rank with normalised factors, and a learned strength."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("delora", "DeloraConfig", r=3)


def delora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    delora("linear/plain", B.MLP, LINEARS, second={"r": 2, "delora_lambda": 4}),
    delora("linear/2d", B.MLP_2D, LINEARS),
    delora("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False, delora_lambda=2),
    delora("linear/dropout", B.MLP, LINEARS, module_dropout=0.4, train=True),
    delora("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    delora("linear/bias_delora_only", B.MLP, LINEARS, bias="delora_only", **trained_bias()),
    delora("targets/patterns", B.STACK, ["q", "up"], rank_pattern={"layers.1.q": 2, "up": 4}, lambda_pattern={"q": 9}),
    delora("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    delora("llama/default", B.LLAMA, None, task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("delora/refused/conv2d", "DeloraConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "TypeError"),
    Refused("delora/refused/embedding", "DeloraConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject",
            "TypeError"),
    Refused("delora/refused/rank", "DeloraConfig", {"target_modules": ["wide"], "r": 0}, B.MLP, "inject", "ValueError"),
]
