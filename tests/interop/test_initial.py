"""Initial values: equal to peft's at equal seed, and a fresh adapter changes nothing."""

import pytest
import torch

from . import harness as H
from .cases import each_case


def drawn(library, case):
    """All tensors of a fresh model, drawn at seed 3."""
    return dict(H.shared(case, library.__name__, lambda: H.snapshot(H.adapt(library, case, at=3))))


@each_case()
def test_values_at_equal_seed(case, lib, ref):
    """All tensors, the base model's included: PiSSA and OLoRA rewrite its weights."""
    want, got = drawn(ref, case), drawn(lib, case)
    if case.exact_init:
        H.identical(got, want)
    else:  # what is left in a frozen weight W is W less a product, exact to the rounding of W, however small it is
        before = {f"base_model.model.{k}": t for k, t in case.base.build().state_dict().items()}
        for tensors in (got, want):
            for name in [n for n in tensors if n.endswith(".base_layer.weight")]:
                tensors[name] = tensors[name] + before[name.replace(".base_layer.", ".")]
        H.close(got, want, 1e-5)


@each_case()
def test_what_the_global_seed_decides(case, lib, ref):
    """A tensor that peft draws from a key in the config, or from nothing, must not move with the global seed."""

    def moved(module):
        one, two = drawn(module, case), H.snapshot(H.adapt(module, case, at=4))
        return {name for name in one if not torch.equal(one[name], two[name])}

    assert moved(lib) == moved(ref)


@each_case(lambda c: c.fresh)
def test_fresh_adapter_is_the_identity(case, lib, is_ref):
    if is_ref and "fresh" in case.disputed:
        pytest.skip(f"disputed: {case.disputed['fresh']}")
    model = H.adapt(lib, case).double()
    batch = H.inputs(case, torch.float64)
    base = H.run(case.base.build(torch.float64), {k: v for k, v in batch.items() if k not in case.inputs})
    # made in float32: PiSSA's and OLoRA's factors, DoRA's magnitudes
    H.close(H.weighable(case, H.run(model, batch)), H.weighable(case, base), 1e-6 if case.exact_init else 1e-5)
