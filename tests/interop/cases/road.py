"""RoAd: pairs of outputs turned and stretched."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
_row = rows("road", "RoadConfig", group_size=4, target_modules=LINEARS, mixed=True)

CASES = [
    *[_row(f"linear/{v}", B.MLP, variant=v) for v in ("road_1", "road_2", "road_4")],
    _row("linear/2d", B.MLP_2D),
    _row("linear/group_of_two", B.MLP, group_size=2, variant="road_4"),
    _row("linear/other_group", B.MLP, second={"variant": "road_2", "group_size": 2}),
    _row("linear/init_false", B.MLP, init_weights=False, variant="road_2", fresh=False),
    _row("targets/modules_to_save", B.STACK, target_modules=["q", "up"], modules_to_save=["head"], stacks=False,
         mixed=False),
    _row("targets/regex", B.STACK, target_modules=r".*\.(q|down)"),
    _row("bert_seq/plain", B.BERT_SEQ, target_modules=["query", "value"], task_type="SEQ_CLS", stacks=False,
         mixed=False),
    _row("llama/plain", B.LLAMA, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("road/refused/odd_group", "RoadConfig", {"target_modules": LINEARS, "group_size": 3}, B.MLP, "inject",
            "ValueError"),
    Refused("road/refused/group_too_large", "RoadConfig", {"target_modules": LINEARS, "group_size": 8}, B.MLP, "inject",
            "ValueError"),
    Refused("road/refused/variant", "RoadConfig", {"target_modules": LINEARS, "variant": "road_3"}, B.MLP, "inject",
            "ValueError"),
    Refused("road/refused/conv2d", "RoadConfig", {"target_modules": ["first"], "group_size": 2}, B.CONV2D, "inject",
            "ValueError"),
]
