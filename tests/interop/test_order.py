"""The order of the trained tensors: an optimizer's saved state goes by place, so it is part of a checkpoint."""

from . import harness as H
from .cases import CASES, each_case
from .cases.case import Case

ONE_OF_EACH = {c.method: c for c in reversed(CASES) if c.second is not None}.values()


def trained(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@each_case(lambda c: c.prompt or not c.base.transformers)
def test_of_one_adapter(ref, lib, case: Case):
    assert trained(H.adapt(lib, case)) == trained(H.adapt(ref, case))


@each_case(lambda c: c in ONE_OF_EACH and c.method != "lokr")  # whose second adapter has tensors of other names
def test_of_two(ref, lib, case: Case):
    ours, theirs = (H.add(module, H.adapt(module, case), case, "other") for module in (lib, ref))
    for name in ("other", "default"):
        for model in (ours, theirs):
            model.set_adapter(name)
        assert trained(ours) == trained(theirs)
