"""aLoRA: LoRA from an invocation sequence on. Where nothing is invoked it is the frozen model: see test_alora.py."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["q_proj", "down_proj"]
INVOKED = {"alora_offsets": [2, 5, None, 3]}
_row = rows("alora", "LoraConfig", task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9], r=4, lora_alpha=6,
            inputs=INVOKED, merges=False, stacks=False, target_modules=LINEARS, second={"r": 2, "lora_alpha": 3})


def alora(id, base=B.LLAMA, **given):
    return _row(id, base, **given)


CASES = [
    alora("llama/plain"),
    alora("llama/rslora", use_rslora=True),
    alora("llama/lora_bias", lora_bias=True),
    alora("llama/init_false", init_lora_weights=False, fresh=False, exact_init=False),
    alora("llama/pissa", init_lora_weights="pissa", exact_init=False, second=None, fresh=False),
    alora("llama/dropout", lora_dropout=0.4, train=True),
    alora("llama/rank_pattern", rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5}, second={}),
    alora("gpt2/plain", B.GPT2, target_modules=["c_attn"], fan_in_fan_out=True),
]

_REFUSED = {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}
REFUSED = [
    Refused("alora/refused/merge", "LoraConfig", {"target_modules": ["q_proj"], **_REFUSED}, B.LLAMA, "merge",
            "NotImplementedError"),
    Refused("alora/refused/embedding", "LoraConfig", {"target_modules": ["embed_tokens"], **_REFUSED}, B.LLAMA,
            "inject", "ValueError"),
    Refused("alora/refused/dora", "LoraConfig", {"target_modules": ["q_proj"], "use_dora": True, **_REFUSED}, B.LLAMA,
            "inject", "ValueError"),
    Refused("alora/refused/conv2d", "LoraConfig", {"target_modules": ["first"], "alora_invocation_tokens": [5]},
            B.CONV2D, "inject", "ValueError"),
]
