"""OSF: the small singular values trained, with gradients kept out of the directions of the large ones."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
RUNS_ONE = {"several": "peft's forward runs the first of several active adapters, its merge adds them all"}
_row = rows("osf", "OSFConfig", tolerance=1e-6, scale=0.2, disputed=RUNS_ONE)


def osf(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    osf("linear/plain", B.MLP, LINEARS, second={"effective_rank": 2}),
    osf("linear/2d", B.MLP_2D, LINEARS, effective_rank=3),
    osf("linear/share", B.MLP, LINEARS, effective_rank=0.3),
    osf("linear/all_but_one", B.MLP, ["square", "wide"], effective_rank=7),
    osf("linear/pattern", B.MLP, LINEARS, effective_rank=2, rank_pattern={"i": 3, "square": 0.5}),
    osf("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    osf("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False, disputed={}),
    osf("targets/all_linear", B.MLP, None, effective_rank=1),
]

REFUSED = [
    Refused("osf/refused/zero", "OSFConfig", {"target_modules": ["wide"], "effective_rank": 0}, B.MLP, "inject",
            "ValueError"),
    Refused("osf/refused/share_of_nothing", "OSFConfig", {"target_modules": ["thin"], "effective_rank": 0.1}, B.MLP,
            "inject", "ValueError"),
]
