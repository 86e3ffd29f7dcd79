"""OFT: the input rotated block by block."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
ORDER = "running applies the first active adapter's rotation first, merging the last's"
KERNEL = "inputs are unfolded, rotated and folded with overlaps summed, so that even a fresh adapter changes the output"
PROJECTS = "running projects the trained parameter in place"
COFT = {"disputed": {"running writes": PROJECTS}, "tolerance": 2e-6}
_row = rows("oft", "OFTConfig", oft_block_size=4)


def oft(id, base, targets, ordered=True, **given):
    disputed = given.pop("disputed", {})
    if ordered and given.get("stacks", True) and given.get("second", {}) is not None:
        disputed = {"several": ORDER, **disputed}
    return _row(id, base, target_modules=targets, disputed=disputed, **given)


CASES = [
    oft("linear/plain", B.MLP, LINEARS),
    oft("linear/2d", B.MLP_2D, LINEARS),
    oft("linear/by_r", B.MLP, LINEARS, r=2, oft_block_size=0),
    oft("linear/block_size_adjusted", B.MLP, LINEARS, oft_block_size=5),
    oft("linear/block_share", B.MLP, LINEARS, block_share=True),
    oft("linear/exact", B.MLP, LINEARS, use_cayley_neumann=False),
    oft("linear/exact_block_share", B.MLP, LINEARS, use_cayley_neumann=False, block_share=True),
    *[oft(f"linear/terms_{n}", B.MLP, LINEARS, num_cayley_neumann_terms=n) for n in (2, 3, 4, 7)],
    oft("linear/coft", B.MLP, LINEARS, coft=True, eps=0.05, **COFT),
    oft("linear/coft_wide", B.MLP, LINEARS, coft=True, eps=50.0),
    oft("linear/coft_block_share", B.MLP, LINEARS, coft=True, eps=0.05, block_share=True, **COFT),
    oft("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    oft("linear/dropout", B.MLP, LINEARS, oft_block_size=2, module_dropout=0.5, ordered=False),
    oft("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    oft("linear/bias_oft_only", B.MLP, LINEARS, bias="oft_only", **trained_bias()),
    oft("targets/layers_to_transform", B.LLAMA, ["q_proj"], layers_to_transform=[1]),
    oft("targets/exclude", B.STACK, ["q", "up"], exclude_modules=["layers.1.q"]),
    oft("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    oft("conv2d/pointwise", B.POINTWISE, ["first", "same"]),
    oft("conv2d/kernel", B.CONV2D, ["first", "same"], disputed={"fresh": KERNEL, "outputs": KERNEL}),
    oft("conv2d_groups/pointwise", B.CONV2D_GROUPS, ["point"], oft_block_size=2, merges=False, ordered=False),
    oft("embedding/plain", B.EMBEDDING, ["emb"], ordered=False),
    oft("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", stacks=False),
    oft("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("oft/refused/groups_kernel", "OFTConfig", {"target_modules": ["first"], "oft_block_size": 4},
            B.CONV2D_GROUPS, "merge", "RuntimeError"),
    Refused("oft/refused/hf_conv1d", "OFTConfig", {"target_modules": ["wide"], "oft_block_size": 4}, B.HF_CONV1D,
            "inject", "TypeError"),
    Refused("oft/refused/conv1d", "OFTConfig", {"target_modules": ["first"], "oft_block_size": 4}, B.CONV1D, "inject",
            "TypeError"),
    Refused("oft/refused/conv3d", "OFTConfig", {"target_modules": ["first"], "oft_block_size": 4}, B.CONV3D, "inject",
            "TypeError"),
    Refused("oft/refused/dilation", "OFTConfig", {"target_modules": ["first"], "oft_block_size": 4}, B.CONV2D_DILATED,
            "inject", "ValueError"),
    Refused("oft/refused/attention", "OFTConfig", {"target_modules": ["attn"], "oft_block_size": 4}, B.ATTENTION,
            "inject", "TypeError"),
]
