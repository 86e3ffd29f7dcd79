"""Super-Tuning: the largest or smallest entries of the weight trained, and a low-rank term beside them."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
_row = rows("supertuning", "SupertuningConfig", sparsity=0.8, target_modules=LINEARS)

CASES = [
    _row("linear/plain", B.MLP),
    _row("linear/2d", B.MLP_2D),
    _row("linear/smallest", B.MLP, select_top=False),
    _row("linear/dense", B.MLP, sparsity=0.0),
    _row("linear/supra", B.MLP, r=3),
    _row("linear/supra_alpha", B.MLP, r=3, lora_alpha=1.5, second={"r": None, "lora_alpha": None}),
    _row("linear/supra_dropout", B.MLP, r=3, lora_dropout=0.4, train=True),
    _row("linear/supra_init_false", B.MLP, r=3, init_weights=False, fresh=False),
    _row("linear/init_false", B.MLP, init_weights=False, fresh=False),
    _row("linear/not_saved", B.MLP, save_precomputed_indices=False),
    _row("targets/modules_to_save", B.STACK, target_modules=["q", "up"], modules_to_save=["head"], stacks=False),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["query", "value"], task_type="SEQ_CLS", stacks=False),
    _row("llama/supra", B.LLAMA, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", r=2),
]

REFUSED = [
    Refused("supertuning/refused/none_left", "SupertuningConfig", {"target_modules": LINEARS, "sparsity": 0.99}, B.MLP,
            "inject", "ValueError"),
    Refused("supertuning/refused/sparsity", "SupertuningConfig", {"target_modules": LINEARS, "sparsity": 1.0}, B.MLP,
            "inject", "ValueError"),
    Refused("supertuning/refused/alpha_alone", "SupertuningConfig", {"target_modules": LINEARS, "lora_alpha": 4}, B.MLP,
            "inject", "ValueError"),
    Refused("supertuning/refused/r", "SupertuningConfig", {"target_modules": LINEARS, "r": 0}, B.MLP, "inject",
            "ValueError"),
    Refused("supertuning/refused/conv2d", "SupertuningConfig", {"target_modules": ["first"], "sparsity": 0.8}, B.CONV2D,
            "inject", "TypeError"),
    Refused("supertuning/refused/hf_conv1d", "SupertuningConfig", {"target_modules": ["wide"], "sparsity": 0.8},
            B.HF_CONV1D, "inject", "TypeError"),
]
