"""use_qalora on layers that are not GPTQ's: a plain LoRA, in peft as here. Those that are: test_qalora."""

from .. import bases as B
from .case import rows

LINEARS = ["square", "wide", "thin"]
_row = rows("qalora", "LoraConfig", use_qalora=True, qalora_group_size=4, r=4, lora_alpha=6,
            second={"r": 2, "lora_alpha": 3}, mixed=True)


def qalora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    qalora("linear/plain", B.MLP, LINEARS),
    qalora("linear/indivisible", B.MLP, LINEARS, qalora_group_size=5),
    qalora("linear/pissa", B.MLP, LINEARS, init_lora_weights="pissa", exact_init=False),
    qalora("conv2d/plain", B.CONV2D, ["first", "same", "point"]),
    qalora("embedding/plain", B.EMBEDDING, ["emb"]),
    qalora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
]
