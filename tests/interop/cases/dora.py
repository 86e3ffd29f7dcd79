"""DoRA: LoRA's delta, with the weight's row norms learned apart."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
CONVS = ["first", "same", "point"]
_row = rows("dora", "LoraConfig", use_dora=True, r=4, lora_alpha=6, second={"r": 2, "lora_alpha": 3})


def dora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    dora("linear/plain", B.MLP, LINEARS),
    dora("linear/2d", B.MLP_2D, LINEARS),
    dora("linear/rslora", B.MLP, LINEARS, use_rslora=True),
    dora("linear/init_false", B.MLP, LINEARS, init_lora_weights=False, fresh=False, exact_init=False),
    dora("linear/gaussian", B.MLP, LINEARS, init_lora_weights="gaussian"),
    dora("linear/pissa", B.MLP, LINEARS, init_lora_weights="pissa", exact_init=False),
    dora("linear/olora", B.MLP, LINEARS, init_lora_weights="olora", exact_init=False),
    dora("linear/dropout", B.MLP, LINEARS, lora_dropout=0.4, train=True),
    dora("linear/rank_pattern", B.MLP, LINEARS, rank_pattern={"wide": 3}, alpha_pattern={"thin": 5}, second={}),
    dora("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    dora("conv1d/plain", B.CONV1D, CONVS),
    dora("conv2d/plain", B.CONV2D, CONVS),
    dora("conv2d_uneven/plain", B.CONV2D_UNEVEN, ["first", "point"]),
    dora("conv3d/plain", B.CONV3D, ["first", "same"]),
    dora("conv1d_groups/plain", B.CONV1D_GROUPS, CONVS, merges=False, second={"r": 2}),
    dora("conv2d_groups/plain", B.CONV2D_GROUPS, CONVS, merges=False, lora_dropout=0.4, train=True),
    dora("conv3d_groups/plain", B.CONV3D_GROUPS, CONVS, merges=False, r=2, use_rslora=True),
    dora("embedding/plain", B.EMBEDDING, ["emb"]),
    dora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    dora("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", stacks=False),
    dora("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("dora/refused/lora_bias", "LoraConfig", {"target_modules": ["wide"], "use_dora": True, "lora_bias": True},
            B.MLP, "inject", "ValueError"),
    Refused("dora/refused/attention", "LoraConfig", {"target_modules": ["attn"], "use_dora": True}, B.ATTENTION,
            "inject", "ValueError"),
    Refused("dora/refused/parameter", "LoraConfig",
            {"target_modules": [], "target_parameters": ["bare.weight"], "use_dora": True}, B.BARE, "inject",
            "ValueError"),
]
