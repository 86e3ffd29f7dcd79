"""HRA: the input reflected r times."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("hra", "HRAConfig", r=4, target_modules=LINEARS)

CASES = [
    _row("linear/plain", B.MLP),
    _row("linear/2d", B.MLP_2D),
    _row("linear/odd", B.MLP, r=3, fresh=False),
    _row("linear/gram_schmidt", B.MLP, r=3, apply_GS=True, fresh=False),
    _row("linear/init_false", B.MLP, init_weights=False, fresh=False),
    _row("linear/second_rank", B.MLP, second={"r": 2, "apply_GS": True, "init_weights": False}),
    _row("linear/bias_all", B.MLP, bias="all", **trained_bias()),
    _row("linear/bias_hra_only", B.MLP, bias="hra_only", **trained_bias()),
    _row("targets/layers_to_transform", B.LLAMA, target_modules=["q_proj"], layers_to_transform=[1]),
    _row("targets/exclude", B.STACK, target_modules=["q", "up"], exclude_modules=["layers.1.q"]),
    _row("conv2d/plain", B.CONV2D, target_modules=["first", "same", "point"]),
    _row("conv2d/gram_schmidt", B.CONV2D, target_modules=["first"], r=3, apply_GS=True, init_weights=False,
         fresh=False),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["query", "value"], task_type="SEQ_CLS", stacks=False),
]

REFUSED = [
    Refused("hra/refused/r", "HRAConfig", {"target_modules": LINEARS, "r": 0}, B.MLP, "inject", "ValueError"),
    Refused("hra/refused/conv2d_groups", "HRAConfig", {"target_modules": ["first"]}, B.CONV2D_GROUPS, "inject",
            "NotImplementedError"),
    Refused("hra/refused/conv2d_uneven", "HRAConfig", {"target_modules": ["first"]}, B.CONV2D_UNEVEN, "run",
            "RuntimeError"),
    Refused("hra/refused/conv1d_dilated", "HRAConfig", {"target_modules": ["first"]}, B.CONV1D_DILATED, "inject",
            "TypeError"),
    Refused("hra/refused/conv3d", "HRAConfig", {"target_modules": ["first"]}, B.CONV3D, "inject", "TypeError"),
    Refused("hra/refused/hf_conv1d", "HRAConfig", {"target_modules": ["wide"]}, B.HF_CONV1D, "inject", "TypeError"),
    Refused("hra/refused/regex_with_layers", "HRAConfig", {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            B.LLAMA, "inject", "ValueError"),
]
