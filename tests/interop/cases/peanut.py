"""PEANuT: a small network of the frozen weight."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
_row = rows("peanut", "PeanutConfig", r=4, scale=0.3, mixed=None)


def peanut(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    peanut("linear/plain", B.MLP, LINEARS, second={"r": 2}),
    peanut("linear/2d", B.MLP_2D, LINEARS, scaling=0.5),
    peanut("linear/depth1", B.MLP, LINEARS, depth=1, act_fn="tanh", second={"depth": 0}),
    peanut("linear/depth3", B.MLP, LINEARS, depth=3, r=3, act_fn="silu", scaling=2.0),
    peanut("linear/init_false", B.MLP, LINEARS, depth=1, init_weights=False, fresh=False),
    peanut("targets/modules_to_save", B.STACK, ["q", "up"], depth=1, modules_to_save=["head"], stacks=False),
    peanut("targets/layers_to_transform", B.LLAMA, ["q_proj"], layers_to_transform=[1], r=3),
    *[
        peanut(f"activation/{name}", B.MLP_2D, ["wide"], depth=1, act_fn=name, init_weights=False, fresh=False)
        for name in ("gelu", "gelu_10", "gelu_new", "hardswish", "laplace", "linear", "quick_gelu", "relu2",
                     "sqrtsoftplus")
    ],
]

REFUSED = [
    Refused("peanut/refused/activation", "PeanutConfig", {"target_modules": ["wide"], "act_fn": "sine"}, B.MLP,
            "inject", "ValueError"),
    Refused("peanut/refused/depth", "PeanutConfig", {"target_modules": ["wide"], "depth": -1}, B.MLP, "inject",
            "ValueError"),
    Refused("peanut/refused/hf_conv1d", "PeanutConfig", {"target_modules": ["wide"], "r": 4}, B.HF_CONV1D, "inject",
            "NotImplementedError"),
    Refused("peanut/refused/conv2d", "PeanutConfig", {"target_modules": ["first"], "r": 4}, B.CONV2D, "inject",
            "NotImplementedError"),
    Refused("peanut/refused/embedding", "PeanutConfig", {"target_modules": ["emb"], "r": 4}, B.EMBEDDING, "inject",
            "NotImplementedError"),
]
