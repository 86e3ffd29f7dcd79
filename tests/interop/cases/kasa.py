"""KaSA: LoRA with singular values of its own, on a weight that has lost its smallest ones."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
LATE = "the frozen weight is truncated in the first forward pass after low_cpu_mem_usage=True, not when it is loaded"
_row = rows("kasa", "LoraConfig", kasa_config={"beta": 0.02, "gamma": 0.03}, r=3, lora_alpha=6, fresh=False,
            exact_init=False, mixed=True, second={"r": 2, "lora_alpha": 3})


def kasa(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    kasa("linear/plain", B.MLP, LINEARS),
    kasa("linear/2d", B.MLP_2D, LINEARS),
    kasa("linear/defaults", B.MLP, LINEARS, kasa_config={}),
    kasa("linear/rslora", B.MLP, LINEARS, use_rslora=True),
    kasa("linear/init_false", B.MLP, LINEARS, init_lora_weights=False),
    kasa("linear/gaussian", B.MLP, LINEARS, init_lora_weights="gaussian"),
    kasa("linear/pissa", B.MLP, LINEARS, init_lora_weights="pissa"),
    kasa("linear/lora_bias", B.MLP, ["square", "wide"], lora_bias=True),
    kasa("linear/dropout", B.MLP, LINEARS, lora_dropout=0.4, train=True),
    kasa("linear/rank_pattern", B.MLP, LINEARS, rank_pattern={"wide": 2}, alpha_pattern={"thin": 5}, second={}),
    kasa("linear/larger_second", B.MLP, LINEARS, r=1, second={"r": 3}),
    kasa("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    kasa("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", stacks=False),
    kasa("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]


def refused(id, base, step="inject", **given):
    return Refused(f"kasa/refused/{id}", "LoraConfig", {"kasa_config": {}, "r": 2, **given}, base, step, "ValueError")


REFUSED = [
    refused("dora", B.MLP, target_modules=["wide"], use_dora=True),
    refused("mica", B.MLP, target_modules=["wide"], init_lora_weights="mica"),
    refused("rank", B.MLP, target_modules=["thin"], r=100),
    refused("conv1d", B.HF_CONV1D, target_modules=["wide"], fan_in_fan_out=True),
    refused("conv2d", B.CONV2D, target_modules=["same"]),
    refused("embedding", B.EMBEDDING, target_modules=["emb"]),
    refused("attention", B.ATTENTION, target_modules=["attn"]),
    refused("parameter", B.BARE, target_modules=[], target_parameters=["bare.weight"]),
]
