"""FRoD: the weight itself in a basis that layers of the same role share. peft decomposes in float32."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("frod", "FrodConfig", sparse_rate=0.1, progressbar=False, tolerance=1e-6)


def frod(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    frod("linear/plain", B.MLP, LINEARS),
    frod("linear/2d", B.MLP_2D, LINEARS, sparse_rate=1.0),
    frod("linear/diagonal", B.MLP, LINEARS, sparse_rate=0.0),
    frod("linear/key", B.MLP, LINEARS, projection_prng_key=77, regularization_alpha=0.5),
    frod("linear/not_saved", B.MLP, LINEARS, save_projection=False),
    frod("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    frod("linear/dropout", B.MLP, LINEARS, frod_dropout=0.4, train=True),
    frod("linear/second", B.MLP, LINEARS, second={"target_modules": ["wide"]}),
    frod("linear/bias_frod_only", B.MLP, LINEARS, bias="frod_only", **trained_bias()),
    frod("stack/plain", B.STACK, ["q", "up", "down"]),
    frod("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    frod("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    frod("bert/all_linear", B.BERT, "all-linear", sparse_rate=0.02),
    frod("llama/plain", B.LLAMA, None, task_type="CAUSAL_LM"),
    frod("llama/one_block", B.LLAMA, ["q_proj"], layers_to_transform=[1], second={"layers_to_transform": [0]}),
]

REFUSED = [
    Refused("frod/refused/embedding", "FrodConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject", "ValueError"),
    Refused("frod/refused/conv2d", "FrodConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "ValueError"),
    Refused("frod/refused/rate", "FrodConfig", {"target_modules": ["wide"], "sparse_rate": 1.5}, B.MLP, "inject",
            "ValueError"),
]
