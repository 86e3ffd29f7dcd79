"""MonteCLoRA: LoRA whose A is perturbed while it trains. The draws and the loss are in test_monteclora.py."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
STRONG = {"num_samples": 3, "sample_scaler": 0.1, "buffer_size": 2}
OTHER = {"num_samples": 5, "sample_scaler": 0.2, "buffer_size": 3, "use_entropy": True}
_row = rows("monteclora", "LoraConfig", r=4, lora_alpha=6, tolerance=1e-7,  # partly in float32 while training
            second={"r": 2, "lora_alpha": 3, "monteclora_config": OTHER})


def monteclora(id, base, targets, **given):
    given = {"monteclora_config": STRONG, "mixed": True, "train": True, **given}
    return _row(id, base, target_modules=targets, **given)


def refused(id, base, targets, **given):
    fields = {"target_modules": targets, "monteclora_config": STRONG, **given}
    return Refused(f"monteclora/refused/{id}", "LoraConfig", fields, base, "inject", "ValueError")


CASES = [
    monteclora("linear/plain", B.MLP, LINEARS),
    monteclora("linear/2d", B.MLP_2D, LINEARS),
    monteclora("linear/entropy", B.MLP, LINEARS, monteclora_config=OTHER),
    monteclora("linear/one_sample", B.MLP, LINEARS, monteclora_config={**STRONG, "num_samples": 1}),
    monteclora("linear/rank_one", B.MLP, LINEARS, r=1),
    monteclora("linear/rslora", B.MLP, LINEARS, use_rslora=True),
    monteclora("linear/init_false", B.MLP, LINEARS, init_lora_weights=False, fresh=False),
    monteclora("linear/gaussian", B.MLP, LINEARS, init_lora_weights="gaussian"),
    monteclora("linear/dropout", B.MLP, LINEARS, lora_dropout=0.4),
    monteclora("linear/rank_pattern", B.MLP, LINEARS, rank_pattern={"wide": 3}, alpha_pattern={"thin": 5},
               second={"monteclora_config": OTHER}),
    monteclora("stack/olora", B.STACK, ["q", "up"], init_lora_weights="olora", exact_init=False),
    monteclora("stack/lora_bias", B.STACK, ["q", "up"], lora_bias=True),
    monteclora("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    monteclora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    monteclora("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", stacks=False),
    monteclora("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    refused("conv2d", B.CONV2D, ["first"]),
    refused("embedding", B.EMBEDDING, ["emb"]),
    refused("dora", B.MLP, LINEARS, use_dora=True),
    refused("velora", B.MLP, LINEARS, velora_config={}),
    refused("mica", B.MLP, LINEARS, init_lora_weights="mica"),
    refused("samples", B.MLP, LINEARS, monteclora_config={"num_samples": 0}),
    refused("prior", B.MLP, LINEARS, monteclora_config={"dirichlet_prior": 0.0}),
    refused("buffer", B.MLP, LINEARS, monteclora_config={"buffer_size": 0}),
]
