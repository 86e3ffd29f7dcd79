"""Merging: the same weights as peft, the same output as running, nothing left behind after unmerging."""

import pytest
import torch

from . import harness as H
from .cases import each_case, firsts

REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)
mergeable = each_case(lambda c: c.merges and not c.prompt)
EACH_BASE = firsts(2)


def skip_reference(is_ref, case, what):
    if is_ref and what in case.disputed:
        pytest.skip(f"disputed: {case.disputed[what]}")


def frozen(model):
    """The base model's tensors; the adapter's own may move while merging (LN tuning swaps, CoFT projects)."""
    return {k: v for k, v in H.snapshot(model).items() if ".default" not in k}


@mergeable
def test_merged_weights(case, lib, ref, is_ref):
    skip_reference(is_ref, case, "merge")
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    batch = H.inputs(case, torch.float64)
    running = H.weighable(case, H.run(ours, batch))
    before = H.snapshot(ours)
    try:
        ours.merge_adapter()
    except REFUSALS:
        assert "merge" in case.disputed, "refused to merge what peft merges"
        H.identical(H.snapshot(ours), before)
        return
    tolerance = H.tolerance(case, torch.float64)
    if not (is_ref and "outputs" in case.disputed):
        H.close(H.weighable(case, H.run(ours, batch)), running, tolerance)
    if "merge" not in case.disputed:
        theirs.merge_adapter()
        H.close(frozen(ours), frozen(theirs), tolerance)
        assert H.differ(H.snapshot(theirs), before, 1e-6), "merging changed nothing: the case cannot fail"


@each_case(lambda c: c.merges and not c.prompt and not c.disputed and c.id in EACH_BASE)
def test_no_bit_changes_that_need_not(case, lib, ref):
    """What merging leaves as it is in peft, such as the weight where an adapter only shifts, it leaves here."""
    theirs, ours = H.pair(ref, lib, case)
    before = H.snapshot(ours)
    theirs.merge_adapter()
    ours.merge_adapter()
    left = [k for k, v in frozen(theirs).items() if torch.equal(v, before[k])]
    H.identical({k: H.snapshot(ours)[k] for k in left}, {k: before[k] for k in left})


@mergeable
def test_merge_and_unload(case, lib, ref, is_ref):
    skip_reference(is_ref, case, "merge")
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    batch = H.inputs(case, torch.float64)
    running = H.weighable(case, H.run(ours, batch))
    try:
        plain = ours.merge_and_unload()
    except REFUSALS:
        assert "merge" in case.disputed, "refused to merge what peft merges"
        return
    tolerance = H.tolerance(case, torch.float64)
    if not (is_ref and "outputs" in case.disputed):
        H.close(H.weighable(case, H.run(plain, batch)), running, tolerance)
    if not {"merge", "restore"} & set(case.disputed):
        want = theirs.merge_and_unload()
        H.close(plain.state_dict(), want.state_dict(), tolerance)
        assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in want.named_modules()}
    if not (is_ref and "restore" in case.disputed) and "layer_replication" not in case.kwargs:
        H.same_names(plain.state_dict(), case.base.build().state_dict())


@mergeable
def test_safe_merge(case, lib, is_ref):
    skip_reference(is_ref, case, "merge")
    models = [H.move(H.adapt(lib, case), case.scale) for _ in range(2)]
    try:
        models[0].merge_adapter()
    except REFUSALS:
        assert "merge" in case.disputed
        return
    models[1].merge_adapter(safe_merge=True)
    H.close(H.snapshot(models[1]), H.snapshot(models[0]), 1e-6)


@mergeable
def test_safe_merge_refuses_what_is_not_finite(case, lib, is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test: peft does not check every method, and stops half-way")
    model = H.move(H.adapt(lib, case), case.scale)
    own = [p for n, p in model.named_parameters() if p.requires_grad and ".default" in n and "modules_to_save" not in n]
    for p in own:
        p.data.fill_(float("nan"))
    before = H.snapshot(model)
    with pytest.raises(REFUSALS):
        model.merge_adapter(safe_merge=True)
    H.identical(H.snapshot(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@mergeable
def test_unmerge_changes_no_bit(case, dtype, lib, is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test: peft subtracts, and rounding stays")
    model = H.move(H.adapt(lib, case, dtype=dtype), case.scale)
    before = H.snapshot(model)
    for _ in range(10 if case.id.endswith("/plain") and not case.base.transformers else 3):
        try:
            model.merge_adapter()
        except REFUSALS:
            assert "merge" in case.disputed
        model.unmerge_adapter()
        H.identical(model.state_dict(), before)  # after each: then more of them say no more


@each_case()
def test_disabled(case, lib, ref, is_ref):
    skip_reference(is_ref, case, "disabled")
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    batch = H.inputs(case, torch.float64)
    running = H.run(ours, batch)
    with ours.disable_adapter():
        got = H.run(ours, batch)
    if "disabled" in case.disputed:
        want = H.run(case.base.build(torch.float64), batch)
    else:
        with theirs.disable_adapter():
            want = H.run(theirs, batch)
    tolerance = H.tolerance(case, torch.float64)
    H.close(got, want, tolerance)
    H.close(H.run(ours, batch), running, tolerance)


@each_case(lambda c: not c.prompt)
def test_unload(case, lib, ref, is_ref):
    skip_reference(is_ref, case, "restore")
    theirs, ours = H.pair(ref, lib, case)
    want = theirs_without_adapter(case)
    starts = str(case.kwargs.get("init_lora_weights"))
    if starts.startswith(("pissa", "olora")) or case.method == "kasa":  # they change the base model for good
        keys = [key for key in theirs.state_dict() if ".base_layer." in key]
        left = theirs.unload().state_dict()
        want |= {k: left[k] for k in (key.removeprefix("base_model.model.").replace(".base_layer", "") for key in keys)}
    H.identical(ours.unload().state_dict(), want)


def theirs_without_adapter(case):
    """The base model. (peft's unload() leaves what was trained in a module's place: neither one nor the other.)"""
    return case.base.build().state_dict()


@each_case(lambda c: c.prompt or not c.merges)
def test_what_peft_does_not_merge(case, lib, is_ref):
    """Either a clear refusal that leaves the model as it was, or a merge that obeys the law."""
    model = H.move(H.adapt(lib, case).double(), case.scale)
    batch = H.inputs(case, torch.float64)
    running, before = H.run(model, batch), H.snapshot(model)
    if is_ref:
        with pytest.raises((*REFUSALS, AttributeError)):
            model.merge_adapter()
        return
    try:
        model.merge_adapter()
    except REFUSALS as error:
        assert str(error), "a refusal says why"
        H.identical(H.snapshot(model), before)
    except AttributeError:
        assert case.prompt, "a prompt has nothing to merge, other methods say why they refuse"
    else:
        H.close(H.run(model, batch), running, H.tolerance(case, torch.float64))


def test_one_copy_of_a_layer_takes_the_place_of_another(lib, ref):
    """LN tuning: merging takes out what was merged, as in peft, and two at once are refused."""
    weights = {}
    for module in (ref, lib):
        H.seed(0)
        config = module.LNTuningConfig(target_modules=["0"])
        model = module.get_peft_model(torch.nn.Sequential(torch.nn.LayerNorm(6)), config)
        model.add_adapter("other", module.LNTuningConfig(target_modules=["0"]))
        H.move(model, only=H.adapter_or_trainable)
        with pytest.raises(ValueError, match="merg"):
            model.merge_adapter(["default", "other"])
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
        (layer,) = [m for m in model.modules() if hasattr(m, "merged_adapters")]
        assert list(layer.merged_adapters) == ["other"]
        merged = layer.base_layer.weight.clone()
        model.unmerge_adapter()
        weights[module] = merged, layer.base_layer.weight.clone()
    assert torch.equal(weights[lib][0], weights[ref][0])
    assert torch.equal(weights[lib][1], torch.ones(6))
