"""BD-LoRA: A or B block-diagonal, chosen by parts of the layers' paths."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
BLOCKS = {"target_modules_bd_a": ["square", "thin"], "target_modules_bd_b": ["wide"], "nblocks": 2}
_row = rows("bdlora", "LoraConfig", use_bdlora=BLOCKS, r=4, lora_alpha=6, second={"r": 2, "lora_alpha": 3}, mixed=True)


def bdlora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    bdlora("linear/some_plain", B.MLP, LINEARS, use_bdlora={  # it also names layers of test_model_families
        "target_modules_bd_a": ["thin", "down_proj", "out_proj", ".wo", "fc2"],
        "target_modules_bd_b": ["wide", ".q", ".v"], "nblocks": 2, "match_strict": False}),
    bdlora("linear/plain", B.MLP, LINEARS),
    bdlora("linear/2d", B.MLP_2D, LINEARS),
    bdlora("linear/other_side", B.MLP, LINEARS, second={}, use_bdlora={
        "target_modules_bd_a": ["wide"], "target_modules_bd_b": ["square", "thin"], "nblocks": 4}),
    bdlora("linear/one_block", B.MLP, LINEARS, use_bdlora={**BLOCKS, "nblocks": 1}),
    bdlora("linear/rslora", B.MLP, LINEARS, use_rslora=True),
    bdlora("linear/init_false", B.MLP, LINEARS, init_lora_weights=False, fresh=False),
    bdlora("linear/gaussian", B.MLP, LINEARS, init_lora_weights="gaussian"),
    bdlora("linear/dropout", B.MLP, LINEARS, lora_dropout=0.4, train=True),
    bdlora("linear/rank_pattern", B.MLP, LINEARS, rank_pattern={"wide": 6}, alpha_pattern={"thin": 5}, second={}),
    bdlora("linear/lora_bias", B.MLP, ["square"], lora_bias=True),
    bdlora("linear/part_of_path", B.STACK, ["q", "up", "down"], use_bdlora={
        "target_modules_bd_a": ["layers.1.", "down"], "target_modules_bd_b": ["s.0.up", "2.q", "3.q"], "nblocks": 2,
        "match_strict": False}),
    bdlora("targets/modules_to_save", B.STACK, ["q"], use_bdlora={"target_modules_bd_b": ["q"], "nblocks": 2},
           modules_to_save=["head"], stacks=False),
    bdlora("llama/plain", B.LLAMA, ["q_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM", use_bdlora={
        "target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "up_proj"], "nblocks": 2}),
]


def refused(id, base, step="inject", error="ValueError", **config):
    fields = {"target_modules": LINEARS, "use_bdlora": BLOCKS, "r": 4, **config}
    return Refused(f"bdlora/refused/{id}", "LoraConfig", fields, base, step, error)


REFUSED = [
    refused("no_match", B.MLP, use_bdlora={"target_modules_bd_a": ["square"]}),
    refused("both", B.MLP, use_bdlora={"target_modules_bd_a": ["square", "i"], "target_modules_bd_b": ["wide"]}),
    refused("overlap", B.MLP, use_bdlora={"target_modules_bd_a": LINEARS, "target_modules_bd_b": ["wide"]}),
    refused("rank", B.MLP, r=5),
    refused("size", B.MLP, use_bdlora={**BLOCKS, "nblocks": 8}, r=8),
    refused("two_variants", B.MLP, use_dora=True),
    refused("hf_conv1d", B.HF_CONV1D, error="AttributeError", fan_in_fan_out=True),
    refused("conv2d", B.CONV2D, target_modules=["first"], use_bdlora={"target_modules_bd_a": ["first"]}),
    refused("embedding", B.EMBEDDING, target_modules=["emb"], use_bdlora={"target_modules_bd_a": ["emb"]}),
    refused("attention", B.ATTENTION, target_modules=["attn"], use_bdlora={"target_modules_bd_a": ["attn"]}),
    refused("parameter", B.BARE, target_modules=[], target_parameters=["bare.weight"], use_bdlora={
        "target_modules_bd_a": ["bare"]}),
]
