"""Uni-LoRA: all low-rank factors of the model are entries of one vector."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("unilora", "UniLoraConfig", r=3, theta_d_length=37, scale=0.3, fresh=False)


def unilora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    unilora("linear/plain", B.MLP, LINEARS),
    unilora("linear/2d", B.MLP_2D, LINEARS),
    unilora("linear/unused_entries", B.MLP, LINEARS, theta_d_length=500),
    unilora("linear/seed", B.MLP, LINEARS, proj_seed=7),
    unilora("linear/save_indices", B.MLP, LINEARS, save_indices=True),
    unilora("linear/bound", B.MLP, LINEARS, init_theta_d_bound=0.7),
    unilora("linear/init_false", B.MLP, LINEARS, init_weights=False),
    unilora("linear/dropout", B.MLP, LINEARS, unilora_dropout=0.4, train=True),
    unilora("linear/bias_unilora_only", B.MLP, LINEARS, bias="unilora_only", **trained_bias()),
    unilora("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    unilora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    unilora("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("unilora/refused/embedding", "UniLoraConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject",
            "TypeError"),
    Refused("unilora/refused/conv2d", "UniLoraConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "TypeError"),
]
