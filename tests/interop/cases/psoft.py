"""PSOFT: a rotation inside the weight's principal subspace. No id ends in /plain: peft refuses float64 models."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
_row = rows("psoft", "PsoftConfig", r=4, psoft_alpha=4, own_buffers=True, tolerance=1e-7)


def psoft(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    psoft("linear/default", B.MLP, LINEARS, second={"r": 2}),
    psoft("linear/2d", B.MLP_2D, LINEARS, psoft_alpha=3, r=3),
    psoft("linear/pissa", B.MLP, LINEARS, ab_svd_init="pissa_init", psoft_alpha=8),
    psoft("linear/lowrank", B.MLP, LINEARS, psoft_svd="lowrank", psoft_svd_lowrank_niter=3, random_seed=5),
    psoft("linear/no_vectors", B.MLP, LINEARS, psoft_mag_a=False, psoft_mag_b=False),
    psoft("linear/free", B.MLP, LINEARS, psoft_orth=False, psoft_mag_b=False, second={"psoft_mag_a": False}),
    psoft("linear/neumann", B.MLP, LINEARS, use_cayley_neumann=True),
    psoft("linear/neumann_one", B.MLP, LINEARS, use_cayley_neumann=True, num_cayley_neumann_terms=1),
    psoft("linear/neumann_two", B.MLP, LINEARS, use_cayley_neumann=True, num_cayley_neumann_terms=2),
    psoft("linear/neumann_eps", B.MLP, LINEARS, use_cayley_neumann=True, num_cayley_neumann_terms=4,
          cayley_neumann_eps=0.2, scale=0.5),
    psoft("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    psoft("linear/free_init_false", B.MLP, LINEARS, init_weights=False, psoft_orth=False, fresh=False),
    psoft("linear/dropout", B.MLP, LINEARS, psoft_dropout=0.4, train=True),
    psoft("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    psoft("llama/default", B.LLAMA, None, r=5, task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("psoft/refused/rank", "PsoftConfig", {"target_modules": ["thin"], "r": 5}, B.MLP, "inject", "ValueError"),
    Refused("psoft/refused/eps", "PsoftConfig",
            {"target_modules": ["wide"], "r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 1.0}, B.MLP,
            "inject", "ValueError"),
    Refused("psoft/refused/conv2d", "PsoftConfig", {"target_modules": ["first"], "r": 2}, B.CONV2D, "inject",
            "ValueError"),
    Refused("psoft/refused/hf_conv1d", "PsoftConfig", {"target_modules": ["wide"], "r": 4}, B.HF_CONV1D, "inject",
            "ValueError"),
]
