"""An adapted model on the meta device that is given its tensors by `load_state_dict(assign=True)`, as for FSDP."""

import pytest
import torch

import minipeft

from . import harness as H
from .test_core import FIRST

LOST = {"shira", "frod", "unilora", "osf"}  # what a state dict does not have, so that running is an error
NEEDED = {"adamss", "alora"}  # they look at weights, or at what a model makes of them, first


@pytest.mark.parametrize("method", [method for method in FIRST if method not in NEEDED])
def test_it_computes_what_the_model_does(method):
    case = FIRST[method]
    model = H.move(H.adapt(minipeft, case), case.scale)
    with torch.device("meta"):
        empty = case.base.build().to("meta")
    again = H.adapt(minipeft, case, base=empty)
    again.load_state_dict(model.state_dict(), assign=True)
    batch = H.inputs(case)
    if method in LOST:
        with pytest.raises(RuntimeError, match="meta"):
            H.run(again, batch)
        return
    H.close(H.run(again, batch), H.run(model, batch), 1e-6)
