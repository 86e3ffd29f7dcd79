"""LoHa: the elementwise product of two low-rank matrices."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
CONVS = ["first", "same", "point"]
WRONG = {"gradients": "with a core for the kernel, the hand-written backward pass takes one factor for the other"}
_row = rows("loha", "LoHaConfig", r=4, alpha=5)


def loha(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    loha("linear/plain", B.MLP, LINEARS, second={"r": 2}),
    loha("linear/2d", B.MLP_2D, LINEARS),
    loha("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    loha("linear/rank_dropout", B.MLP, LINEARS, rank_dropout=0.4, train=True),
    loha("linear/module_dropout", B.MLP, LINEARS, module_dropout=0.6, train=True),
    loha("targets/patterns", B.STACK, ["q", "up"], rank_pattern={"layers.1.q": 2, "up": 4}, alpha_pattern={"q": 9}),
    loha("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    loha("conv1d/plain", B.CONV1D, CONVS),
    loha("conv1d/effective", B.CONV1D, CONVS, use_effective_conv2d=True, disputed=WRONG),
    loha("conv1d_groups/effective", B.CONV1D_GROUPS, CONVS, use_effective_conv2d=True, disputed=WRONG),
    loha("conv2d/plain", B.CONV2D, CONVS),
    loha("conv2d/effective", B.CONV2D, CONVS, use_effective_conv2d=True, disputed=WRONG, init_weights=False,
         fresh=False),
    loha("conv2d_uneven/effective", B.CONV2D_UNEVEN, ["first", "point"], use_effective_conv2d=True, disputed=WRONG),
    loha("conv2d_groups/plain", B.CONV2D_GROUPS, CONVS),
    loha("llama/default", B.LLAMA, None, task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("loha/refused/attention", "LoHaConfig", {"target_modules": ["attn"]}, B.ATTENTION, "inject", "TypeError"),
    Refused("loha/refused/rank", "LoHaConfig", {"target_modules": ["wide"], "r": 0}, B.MLP, "inject", "ValueError"),
]
