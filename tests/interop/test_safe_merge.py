"""safe_merge: what is checked is what the layer holds afterwards, in its own dtype; a refused merge changes nothing."""

import copy

import pytest
import torch

from . import harness as H
from .cases import CASES

FIRST = {}  # one case of each method on each base model
for _case in CASES:
    if _case.merges and not _case.prompt and not _case.base.transformers:
        FIRST.setdefault((_case.method, _case.base.name), _case)
OWN = {"ln_tuning", "trainable_tokens"}  # what they merge are numbers of the adapter's own, of the same dtype
MOST = 65504  # of a float16


def at_the_limit(lib, case, scale):
    """The case in float16, its frozen weights as large as they may be, every trained tensor moved by `scale`."""
    model = H.adapt(lib, case, dtype=torch.float16)
    with torch.no_grad():
        for name, p in H.move(model, scale).named_parameters():
            if ".base_layer." in name:
                p.copy_(torch.where(p >= 0, MOST, -MOST))
            p.nan_to_num_()
    return model


def finite(model):
    return all(torch.isfinite(t).all() for t in model.state_dict().values())


@pytest.mark.parametrize("case", FIRST.values(), ids=[c.id for c in FIRST.values()])
def test_what_overflows_is_refused(case, lib, is_ref):
    if is_ref:
        pytest.skip("peft checks before it rounds")
    for scale in (0.1, 30, 3e3, 3e5):
        model = at_the_limit(lib, case, scale)
        stored = copy.deepcopy(model)
        stored.merge_adapter()
        if not finite(stored):
            break
        model.merge_adapter(safe_merge=True)
        H.identical(H.snapshot(model), H.snapshot(stored))
    else:
        assert case.method in OWN
        return
    before = H.snapshot(model)
    for merge in (model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(ValueError, match="safe_merge"):
            merge(safe_merge=True)
        H.identical(H.snapshot(model), before)
        assert not any(getattr(module, "merged_adapters", ()) for module in model.modules())
