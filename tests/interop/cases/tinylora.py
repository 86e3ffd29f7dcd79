"""TinyLoRA: the singular vectors of the frozen weight, mixed by one short vector."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("tinylora", "TinyLoraConfig", r=2, u=5, scale=0.5)


def tinylora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    tinylora("linear/plain", B.MLP, LINEARS),
    tinylora("linear/2d", B.MLP_2D, LINEARS),
    tinylora("linear/full_rank", B.MLP, LINEARS, r=64),
    tinylora("linear/all_tied", B.MLP, LINEARS, weight_tying=1.0),
    tinylora("linear/partly_tied", B.MLP, "square|wide|thin|head", weight_tying=0.4),
    tinylora("linear/seed", B.MLP, LINEARS, projection_seed=7),
    tinylora("linear/not_saved", B.MLP, LINEARS, save_projection=False),
    tinylora("linear/uniform", B.MLP, LINEARS, init_weights="uniform", init_v_bound=0.5, fresh=False),
    tinylora("linear/dropout", B.MLP, LINEARS, tinylora_dropout=0.4, train=True),
    tinylora("linear/bias_tinylora_only", B.MLP, LINEARS, bias="tinylora_only", **trained_bias()),
    tinylora("embedding/plain", B.EMBEDDING, ["emb"]),
    tinylora("embedding/dropout", B.EMBEDDING, ["emb"], tinylora_dropout=0.4, train=True),
    tinylora("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    tinylora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    tinylora("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("tinylora/refused/no_vector", "TinyLoraConfig", {"target_modules": LINEARS, "u": 0}, B.MLP, "inject",
            "ValueError"),
    Refused("tinylora/refused/tying", "TinyLoraConfig", {"target_modules": LINEARS, "weight_tying": 1.5}, B.MLP,
            "inject", "ValueError"),
]
