"""VeRA: two random projections shared by all layers, and a learned scale on each side."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("vera", "VeraConfig", r=6)


def vera(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    vera("linear/plain", B.MLP, LINEARS),
    vera("linear/2d", B.MLP_2D, LINEARS),
    vera("linear/key", B.MLP, LINEARS, projection_prng_key=77),
    vera("linear/not_saved", B.MLP, LINEARS, save_projection=False),
    vera("linear/d_initial", B.MLP, LINEARS, d_initial=0.7),
    vera("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    vera("linear/dropout", B.MLP, LINEARS, vera_dropout=0.4, train=True),
    vera("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    vera("linear/bias_vera_only", B.MLP, LINEARS, bias="vera_only", **trained_bias()),
    vera("targets/layers_to_transform", B.LLAMA, ["q_proj"], layers_to_transform=[1]),
    vera("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    vera("targets/all_linear", B.MLP, "all-linear"),
    vera("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    vera("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", stacks=False),
    vera("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("vera/refused/embedding", "VeraConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject", "ValueError"),
    Refused("vera/refused/conv2d", "VeraConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "ValueError"),
    Refused("vera/refused/attention", "VeraConfig", {"target_modules": ["attn"]}, B.ATTENTION, "inject", "ValueError"),
]
