"""C3A: the delta as blocks of circulant matrices. peft computes it in float32."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
SECOND = "every further active adapter sees the output of the one before instead of the layer's input"
GRADIENT = {"gradients": "the gradient by the input is that of the transposed blocks"}  # which shows from b = 3 on
BIAS = trained_bias()
BIAS["disputed"].update(GRADIENT)
_row = rows("c3a", "C3AConfig", block_size=4, target_modules=LINEARS, tolerance=2e-6, fresh=False, stacks=False)

CASES = [
    _row("linear/plain", B.MLP, disputed=GRADIENT),
    _row("linear/2d", B.MLP_2D, disputed=GRADIENT),
    _row("linear/block_of_two", B.MLP, block_size=2),
    _row("linear/block_of_one", B.MLP, block_size=1),
    _row("linear/whole", B.MLP, target_modules=["square"], block_size=8, stacks=True,
         disputed={"several": SECOND, **GRADIENT}),
    _row("linear/init_true", B.MLP, init_weights=True, fresh=True, disputed=GRADIENT),
    *[_row(f"linear/init_{init}", B.MLP, init_weights=init, disputed=GRADIENT)
      for init in (False, "gaussian", "kaiming_uniform")],
    _row("linear/pattern", B.STACK, target_modules=["q", "up"], block_size_pattern={"up": 2, r"1\.q": 8},
         disputed=GRADIENT),
    _row("linear/bias_all", B.MLP, bias="all", **BIAS),
    _row("linear/bias_c3a_only", B.MLP, bias="c3a_only", **BIAS),
    _row("targets/layers_to_transform", B.LLAMA, target_modules=["q_proj"], layers_to_transform=[1]),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["query", "value"], task_type="SEQ_CLS", disputed=GRADIENT),
]

REFUSED = [
    Refused("c3a/refused/input", "C3AConfig", {"target_modules": ["square"], "block_size": 3}, B.MLP, "inject",
            "ValueError"),
    Refused("c3a/refused/output", "C3AConfig", {"target_modules": ["wide"], "block_size": 8}, B.MLP, "inject",
            "ValueError"),
    Refused("c3a/refused/init", "C3AConfig", {"target_modules": ["wide"], "block_size": 4, "init_weights": "zeros"},
            B.MLP, "inject", "ValueError"),
    Refused("c3a/refused/conv2d", "C3AConfig", {"target_modules": ["first"], "block_size": 2}, B.CONV2D, "inject",
            "TypeError"),
    Refused("c3a/refused/hf_conv1d", "C3AConfig", {"target_modules": ["wide"], "block_size": 4}, B.HF_CONV1D, "inject",
            "TypeError"),
]
