"""VeLoRA: LoRA whose A learns from compressed inputs. How it trains is in test_velora.py."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
GROUPS = {"num_groups": 3, "scale": 0.5}
OTHER = {"num_groups": 5, "init_type": "random"}
_row = rows("velora", "LoraConfig", r=4, lora_alpha=6,
            second={"r": 2, "lora_alpha": 3, "velora_config": OTHER})


def velora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **{"velora_config": GROUPS, "mixed": True, **given})


def refused(id, base, targets, **given):
    return Refused(f"velora/refused/{id}", "LoraConfig", {"target_modules": targets, "velora_config": GROUPS, **given},
                   base, "inject", "ValueError")


CASES = [
    velora("linear/plain", B.MLP, LINEARS),
    velora("linear/2d", B.MLP_2D, LINEARS),
    velora("linear/defaults", B.MLP, LINEARS, velora_config={"num_groups": 64, "scale": 1.0}),
    velora("linear/once", B.MLP, LINEARS, velora_config={"num_groups": 4, "init_type": "batch_average_once"}),
    velora("linear/random", B.MLP, LINEARS, velora_config={"num_groups": 2, "init_type": "random"}),
    velora("linear/rslora", B.MLP, LINEARS, use_rslora=True),
    velora("linear/init_false", B.MLP, LINEARS, init_lora_weights=False, fresh=False),
    velora("linear/gaussian", B.MLP, LINEARS, init_lora_weights="gaussian"),
    velora("stack/olora", B.STACK, ["q", "up"], init_lora_weights="olora", exact_init=False),
    velora("linear/dropout", B.MLP, LINEARS, lora_dropout=0.4, train=True),
    velora("stack/lora_bias", B.STACK, ["q", "up"], lora_bias=True),
    velora("linear/rank_pattern", B.MLP, LINEARS, rank_pattern={"wide": 3}, alpha_pattern={"thin": 5},
           second={"velora_config": OTHER}),
    velora("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    velora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    velora("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", stacks=False),
    velora("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    refused("conv2d", B.CONV2D, ["first"]),
    refused("embedding", B.EMBEDDING, ["emb"]),
    refused("attention", B.ATTENTION, ["attn"]),
    refused("parameter", B.BARE, [], target_parameters=["bare.weight"]),
    refused("dora", B.MLP, LINEARS, use_dora=True),
    refused("mica", B.MLP, LINEARS, init_lora_weights="mica"),
    refused("groups", B.MLP, LINEARS, velora_config={"num_groups": 0}),
    refused("scale", B.MLP, LINEARS, velora_config={"scale": 0.0}),
    refused("init_type", B.MLP, LINEARS, velora_config={"init_type": "mean"}),
]
