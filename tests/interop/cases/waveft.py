"""WaveFT: the delta as an inverse wavelet transform of few coefficients."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
FAMILIES = ["db2", "db10", "sym2", "sym5", "sym8", "sym10", "coif1", "coif2", "coif3", "coif4"]
_row = rows("waveft", "WaveFTConfig", n_frequency=20, target_modules=LINEARS, own_buffers=True)

CASES = [
    _row("linear/plain", B.MLP),
    _row("linear/2d", B.MLP_2D),
    *[_row(f"linear/{family}", B.MLP_2D, wavelet_family=family) for family in FAMILIES],
    _row("linear/db3", B.MLP_2D, wavelet_family="db3", tolerance=1e-9),
    _row("linear/no_idwt", B.MLP, use_idwt=False, wavelet_family="db38"),
    _row("linear/init_false", B.MLP, init_weights=False, fresh=False),
    _row("linear/seed", B.MLP, random_loc_seed=5, scaling=5.0),
    _row("linear/pattern", B.STACK, target_modules=["q", "up"], n_frequency_pattern={"up": 30, r"layers\.1\.q": 7}),
    _row("linear/proportional", B.MLP, proportional_parameters=True, second={"n_frequency": 9,
         "wavelet_family": "sym3"}),
    _row("linear/bias_all", B.MLP, bias="all", **trained_bias()),
    _row("linear/bias_waveft_only", B.MLP, bias="waveft_only", **trained_bias()),
    _row("targets/exclude", B.STACK, target_modules=["q", "up"], exclude_modules=["layers.1.q"]),
    _row("hf_conv1d/plain", B.HF_CONV1D, fan_in_fan_out=True, wavelet_family="db2"),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["query", "value"], task_type="SEQ_CLS", stacks=False),
]

REFUSED = [
    Refused("waveft/refused/too_many", "WaveFTConfig", {"target_modules": LINEARS}, B.MLP, "inject", "ValueError"),
    Refused("waveft/refused/family", "WaveFTConfig",
            {"target_modules": LINEARS, "n_frequency": 5, "wavelet_family": "bior2.2"}, B.MLP, "inject", "ValueError"),
    *[Refused(f"waveft/refused/{family}", "WaveFTConfig", {"target_modules": LINEARS, "n_frequency": 5,
                                                          "wavelet_family": family}, B.MLP, "run", "ValueError")
      for family in ("db11", "sym20", "coif6")],
    Refused("waveft/refused/coif5", "WaveFTConfig", {"target_modules": ["wide"], "n_frequency": 5,
                                                     "wavelet_family": "coif5"}, B.MLP, "run", "RuntimeError"),
    Refused("waveft/refused/conv2d", "WaveFTConfig", {"target_modules": ["first"], "n_frequency": 5}, B.CONV2D,
            "inject",
            "TypeError"),
]
