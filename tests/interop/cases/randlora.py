"""RandLoRA: a full-rank sum of products of random bases that all layers share, with learned scales."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("randlora", "RandLoraConfig", r=3, randlora_alpha=7)


def randlora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    randlora("linear/plain", B.MLP, LINEARS),
    randlora("linear/2d", B.MLP_2D, LINEARS),
    randlora("linear/one_base", B.MLP, LINEARS, r=32),
    randlora("linear/sparse", B.MLP, LINEARS, sparse=True),
    randlora("linear/very_sparse", B.MLP, LINEARS, very_sparse=True),
    randlora("linear/key", B.MLP, LINEARS, projection_prng_key=77),
    randlora("linear/not_saved", B.MLP, LINEARS, save_projection=False),
    randlora("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    randlora("linear/dropout", B.MLP, LINEARS, randlora_dropout=0.4, train=True),
    randlora("linear/bias_randlora_only", B.MLP, LINEARS, bias="randlora_only", **trained_bias()),
    randlora("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    randlora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    randlora("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("randlora/refused/embedding", "RandLoraConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject",
            "ValueError"),
    Refused("randlora/refused/conv2d", "RandLoraConfig", {"target_modules": ["first"]}, B.CONV2D, "inject",
            "ValueError"),
]
