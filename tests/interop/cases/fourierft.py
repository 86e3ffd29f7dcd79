"""FourierFT: the delta as an inverse Fourier transform of few coefficients. peft computes it in float32."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("fourierft", "FourierFTConfig", n_frequency=20, scaling=15.0, target_modules=LINEARS, tolerance=2e-6,
            fresh=False, own_buffers=True)

CASES = [
    _row("linear/plain", B.MLP),
    _row("linear/2d", B.MLP_2D),
    _row("linear/init_true", B.MLP, init_weights=True, fresh=True),
    _row("linear/seed", B.MLP, random_loc_seed=5),
    _row("linear/pattern", B.STACK, target_modules=["q", "up"], n_frequency_pattern={"up": 30, r"1\.q": 7},
         tolerance=1e-5),
    _row("linear/second", B.MLP, second={"n_frequency": 9, "scaling": 30.0}),
    _row("linear/bias_all", B.MLP, bias="all", **trained_bias()),
    _row("linear/bias_fourier_only", B.MLP, bias="fourier_only", **trained_bias()),
    _row("targets/layers_to_transform", B.LLAMA, target_modules=["q_proj"], layers_to_transform=[1]),
    _row("targets/exclude", B.STACK, target_modules=["q", "up"], exclude_modules=["layers.1.q"]),
    _row("hf_conv1d/plain", B.HF_CONV1D, fan_in_fan_out=True),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["query", "value"], task_type="SEQ_CLS", stacks=False),
]

REFUSED = [
    Refused("fourierft/refused/too_many", "FourierFTConfig", {"target_modules": LINEARS}, B.MLP, "inject",
            "ValueError"),
    Refused("fourierft/refused/no_seed", "FourierFTConfig",
            {"target_modules": LINEARS, "n_frequency": 5, "random_loc_seed": None}, B.MLP, "inject", "RuntimeError"),
    Refused("fourierft/refused/conv2d", "FourierFTConfig", {"target_modules": ["first"], "n_frequency": 5}, B.CONV2D,
            "inject", "TypeError"),
    Refused("fourierft/refused/embedding", "FourierFTConfig", {"target_modules": ["emb"], "n_frequency": 5},
            B.EMBEDDING,
            "inject", "TypeError"),
]
