"""IA3: a learned scale on the outputs, or on the inputs of feed-forward modules."""

from .. import bases as B
from .case import Case

LINEARS = ["square", "wide", "thin"]


def ia3(id, base, targets, feedforward=(), **kwargs):
    flags = {k: kwargs.pop(k) for k in list(kwargs) if k in Case.__dataclass_fields__}
    kwargs = {"target_modules": list(targets), "feedforward_modules": list(feedforward), **kwargs}
    return Case(f"ia3/{id}", "IA3Config", kwargs, base, **flags)


CASES = [
    ia3("linear/plain", B.MLP, LINEARS),
    ia3("linear/feedforward", B.MLP, LINEARS, ["wide", "thin"]),
]
