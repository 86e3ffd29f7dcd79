"""VB-LoRA: low-rank factors composed of the vectors of one bank, chosen by learned logits."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("vblora", "VBLoRAConfig", r=3, num_vectors=10, vector_length=4, scale=0.3, fresh=False)


def vblora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    vblora("linear/plain", B.MLP, LINEARS),
    vblora("linear/2d", B.MLP_2D, LINEARS),
    vblora("linear/short_vectors", B.MLP, LINEARS, vector_length=2, num_vectors=5),
    vblora("linear/topk_1", B.MLP, LINEARS, topk=1),
    vblora("linear/topk_all", B.MLP, LINEARS, topk=10),
    vblora("linear/bound_and_std", B.MLP, LINEARS, init_vector_bank_bound=0.4, init_logits_std=0.8),
    vblora("linear/dropout", B.MLP, LINEARS, vblora_dropout=0.4, train=True),
    vblora("linear/bias_vblora_only", B.MLP, LINEARS, bias="vblora_only", **trained_bias()),
    vblora("targets/exclude", B.MLP, LINEARS, exclude_modules=["thin"]),
    vblora("targets/modules_to_save", B.STACK, ["q", "up"], vector_length=2, modules_to_save=["head"], stacks=False),
    vblora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    vblora("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("vblora/refused/embedding", "VBLoRAConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject",
            "TypeError"),
    Refused("vblora/refused/conv2d", "VBLoRAConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "TypeError"),
    Refused("vblora/refused/indivisible", "VBLoRAConfig", {"target_modules": LINEARS, "vector_length": 5}, B.MLP,
            "inject", "ValueError"),
]
