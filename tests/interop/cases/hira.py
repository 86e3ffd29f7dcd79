"""HiRA: the frozen weight times a low-rank matrix, element by element."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
CONVS = ["first", "same"]
_row = rows("hira", "HiraConfig", r=3)


def hira(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    hira("linear/plain", B.MLP, LINEARS, second={"r": 2}),
    hira("linear/2d", B.MLP_2D, LINEARS),
    hira("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    hira("linear/gaussian", B.MLP, LINEARS, init_weights="gaussian"),
    hira("linear/dropout", B.MLP, LINEARS, hira_dropout=0.4, train=True),
    # peft heeds rank_pattern only on layers that have an adapter already
    hira("targets/patterns_of_second", B.STACK, ["q", "up"], second={"rank_pattern": {"layers.1.q": 2, "up": 4}}),
    hira("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    hira("conv1d/plain", B.CONV1D, [*CONVS, "point"]),
    hira("conv2d/plain", B.CONV2D, [*CONVS, "point"]),
    hira("conv2d/gaussian", B.CONV2D_DILATED, ["first", "point"], init_weights="gaussian"),
    hira("conv3d/dropout", B.CONV3D, CONVS, hira_dropout=0.4, train=True),
    hira("embedding/plain", B.EMBEDDING, ["emb", "lin"]),
    hira("embedding/init_none", B.EMBEDDING, ["emb"], init_weights=None),
    hira("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    hira("llama/default", B.LLAMA, None, task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("hira/refused/attention", "HiraConfig", {"target_modules": ["attn"]}, B.ATTENTION, "inject", "ValueError"),
    Refused("hira/refused/regex_and_layers", "HiraConfig", {"target_modules": ".*q", "layers_to_transform": [0]},
            B.STACK, "inject", "ValueError"),
]
