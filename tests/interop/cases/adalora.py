"""AdaLoRA: an SVD-shaped delta whose singular values are pruned while training (test_schedules.py does the steps)."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
CONVS = ["first", "same", "point"]
_row = rows("adalora", "AdaLoraConfig", init_r=6, target_r=3, lora_alpha=5, total_step=12, tinit=2, tfinal=3, deltaT=2,
            second={"inference_mode": True, "init_r": 4})


def adalora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    adalora("linear/plain", B.MLP, LINEARS),
    adalora("linear/2d", B.MLP_2D, LINEARS),
    adalora("linear/init_false", B.MLP, LINEARS, init_lora_weights=False, fresh=False),
    adalora("linear/dropout", B.MLP, LINEARS, lora_dropout=0.4, train=True),
    adalora("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    adalora("linear/bias_lora_only", B.MLP, LINEARS, bias="lora_only", **trained_bias()),
    adalora("targets/layers_to_transform", B.LLAMA, ["q_proj"], layers_to_transform=[1]),
    adalora("targets/exclude", B.STACK, ["q", "up"], exclude_modules=["layers.1.q"]),
    adalora("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    adalora("conv2d/plain", B.CONV2D, CONVS),
    adalora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    adalora("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", own_loss=True, stacks=False),
    adalora("t5/plain", B.T5, ["q", "v"], task_type="SEQ_2_SEQ_LM", own_loss=True),
    adalora("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM", own_loss=True),
    adalora("llama/token_indices", B.LLAMA, ["q_proj"], task_type="CAUSAL_LM", own_loss=True, stacks=False,
            trainable_token_indices=[1, 3]),
]

_BUDGET = {"init_r": 6, "target_r": 3, "total_step": 12, "tinit": 2, "tfinal": 3}
REFUSED = [
    Refused("adalora/refused/embedding", "AdaLoraConfig", {"target_modules": ["emb"], **_BUDGET}, B.EMBEDDING, "inject",
            "ValueError"),
    Refused("adalora/refused/conv1d", "AdaLoraConfig", {"target_modules": ["first"], **_BUDGET}, B.CONV1D, "inject",
            "ValueError"),
    Refused("adalora/refused/conv3d", "AdaLoraConfig", {"target_modules": ["first"], **_BUDGET}, B.CONV3D, "inject",
            "ValueError"),
    Refused("adalora/refused/attention", "AdaLoraConfig", {"target_modules": ["attn"], **_BUDGET}, B.ATTENTION,
            "inject", "ValueError"),
    Refused("adalora/refused/dora", "AdaLoraConfig", {"target_modules": ["wide"], "use_dora": True, **_BUDGET}, B.MLP,
            "inject", "ValueError"),
    Refused("adalora/refused/no_total_step", "AdaLoraConfig", {"target_modules": ["wide"]}, B.MLP, "inject",
            "ValueError"),
    Refused("adalora/refused/second_trains", "AdaLoraConfig", {"target_modules": ["wide"], **_BUDGET}, B.MLP, "second",
            "ValueError"),
]
