"""BOFT: the input rotated by a product of block-diagonal matrices. Without its CUDA kernel peft has one factor only."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("boft", "BOFTConfig", boft_block_size=4, target_modules=LINEARS, own_buffers=True)

CASES = [
    _row("linear/plain", B.MLP),
    _row("linear/2d", B.MLP_2D),
    _row("linear/by_number", B.MLP, boft_block_size=0, boft_block_num=2),
    _row("linear/odd_blocks", B.MLP, target_modules=["thin"], boft_block_size=3),
    _row("linear/init_false", B.MLP, init_weights=False, fresh=False),
    _row("linear/dropout", B.MLP, boft_block_size=2, boft_dropout=0.5, train=True),
    _row("linear/fan_in_fan_out_corrected", B.MLP, fan_in_fan_out=True),
    _row("linear/bias_all", B.MLP, bias="all", **trained_bias()),
    _row("linear/bias_boft_only", B.MLP, bias="boft_only", **trained_bias()),
    _row("targets/layers_to_transform", B.LLAMA, target_modules=["q_proj"], layers_to_transform=[1]),
    _row("targets/exclude", B.STACK, target_modules=["q", "up"], exclude_modules=["layers.1.q"]),
    _row("conv2d/plain", B.CONV2D, target_modules=["first", "same"], boft_block_size=6),
    _row("conv2d/point", B.CONV2D, target_modules=["point"], boft_block_size=2),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["query", "value"], task_type="SEQ_CLS", stacks=False),
]

REFUSED = [
    Refused("boft/refused/both", "BOFTConfig", {"target_modules": LINEARS, "boft_block_size": 4, "boft_block_num": 2},
            B.MLP, "inject", "ValueError"),
    Refused("boft/refused/neither", "BOFTConfig", {"target_modules": LINEARS, "boft_block_size": 0}, B.MLP, "inject",
            "ValueError"),
    Refused("boft/refused/indivisible", "BOFTConfig", {"target_modules": LINEARS, "boft_block_size": 3}, B.MLP,
            "inject",
            "ValueError"),
    Refused("boft/refused/conv2d_groups", "BOFTConfig", {"target_modules": ["first"], "boft_block_size": 2},
            B.CONV2D_GROUPS, "inject", "NotImplementedError"),
    Refused("boft/refused/conv3d", "BOFTConfig", {"target_modules": ["first"], "boft_block_size": 2}, B.CONV3D,
            "inject",
            "TypeError"),
    Refused("boft/refused/hf_conv1d", "BOFTConfig", {"target_modules": ["wide"], "boft_block_size": 2}, B.HF_CONV1D,
            "inject", "TypeError"),
]
