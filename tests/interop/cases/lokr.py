"""LoKr: a Kronecker product."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
CONVS = ["first", "same", "point"]
_row = rows("lokr", "LoKrConfig", r=1, alpha=5)


def lokr(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    lokr("linear/plain", B.MLP, LINEARS, second={"decompose_both": True}),
    lokr("linear/2d", B.MLP_2D, LINEARS),
    lokr("linear/full", B.MLP, LINEARS, r=4),
    lokr("linear/decompose_both", B.MLP, LINEARS, decompose_both=True, decompose_factor=4),
    lokr("linear/decompose_factor", B.MLP, LINEARS, decompose_factor=3),
    lokr("linear/init_false", B.MLP, LINEARS, init_weights=False, decompose_both=True, fresh=False),
    lokr("linear/lycoris", B.MLP, LINEARS, init_weights="lycoris", decompose_both=True),
    lokr("linear/lycoris_full", B.MLP, LINEARS, init_weights="lycoris", r=4),
    lokr("linear/rank_dropout", B.MLP, LINEARS, rank_dropout=0.4, train=True),
    lokr("linear/rank_dropout_scale", B.MLP, LINEARS, rank_dropout=0.4, rank_dropout_scale=True, train=True,
         tolerance=1e-6),
    lokr("linear/module_dropout", B.MLP, LINEARS, module_dropout=0.6, train=True),
    lokr("targets/patterns", B.STACK, ["q", "up"], rank_pattern={"layers.1.q": 2, "up": 4}, alpha_pattern={"q": 9}),
    lokr("conv1d/plain", B.CONV1D, CONVS),
    lokr("conv1d/full", B.CONV1D, CONVS, r=4),
    lokr("conv1d/effective", B.CONV1D, CONVS, r=2, decompose_factor=1, use_effective_conv2d=True),
    lokr("conv2d/plain", B.CONV2D, CONVS),
    lokr("conv2d/full", B.CONV2D, CONVS, r=4, use_effective_conv2d=True),
    lokr("conv2d/effective", B.CONV2D, CONVS, use_effective_conv2d=True, decompose_both=True, decompose_factor=4),
    lokr("conv2d_uneven/effective", B.CONV2D_UNEVEN, ["first", "point"], use_effective_conv2d=True),
    lokr("conv2d_groups/plain", B.CONV2D_GROUPS, CONVS),
    lokr("llama/default", B.LLAMA, None, task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("lokr/refused/attention", "LoKrConfig", {"target_modules": ["attn"]}, B.ATTENTION, "inject", "TypeError"),
    Refused("lokr/refused/rank", "LoKrConfig", {"target_modules": ["wide"], "r": 0}, B.MLP, "inject", "ValueError"),
]
