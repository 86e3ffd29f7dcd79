"""Several adapters on one model: switching, deleting, combining, running together, and one per sample."""

import pytest
import torch

from . import harness as H
from .cases import CASES, each_case

two = each_case(lambda c: c.second is not None)


def pair(ref, lib, case, dtype=torch.float64):
    """Both models with two adapters, moved, the same for all tests of a case; the first adapter is active."""
    def make():
        return H.pair(ref, lib, case, dtype, second=True)

    models = make() if "running writes" in case.disputed else H.shared(case, dtype, make)
    for model in models:
        model.set_adapter("default")
    return models


@two
def test_names_and_trainable_set(case, lib, ref):
    models = [H.add(module, H.adapt(module, case), case, "other") for module in (ref, lib)]
    for step in (lambda m: None, lambda m: m.set_adapter("other"), lambda m: m.set_adapter("default")):
        for model in models:
            step(model)
        theirs, ours = models
        H.same_names(ours.state_dict(), theirs.state_dict())
        assert ours.active_adapters == theirs.active_adapters
        trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours)]
        H.same_names(trained[1], trained[0])
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert list(ours.peft_config) == list(theirs.peft_config) == ["default", "other"]


@two
def test_switching(case, lib, ref):
    dtype = torch.float32 if "moved" in case.disputed else torch.float64
    theirs, ours = pair(ref, lib, case, dtype)
    batch, tolerance, outs = H.inputs(case, dtype), H.tolerance(case, dtype), {}
    for name in ("other", "default", "other"):
        theirs.set_adapter(name)
        ours.set_adapter(name)
        outs[name] = H.run(ours, batch)
        if "outputs" not in case.disputed:
            H.close(outs[name], H.run(theirs, batch), tolerance)
    assert H.differ(outs["default"], outs["other"], 1e-6) or "outputs" in case.disputed


@each_case(lambda c: c.second is not None and c.stacks and not c.prompt)
def test_two_active(case, lib, ref, is_ref):
    if is_ref and "several" in case.disputed:
        pytest.skip(f"disputed: {case.disputed['several']}")
    theirs, ours = pair(ref, lib, case)
    batch, tolerance = H.inputs(case, torch.float64), H.tolerance(case, torch.float64)
    for order in (["default", "other"], ["other", "default"]):
        ours.base_model.set_adapter(order)
        theirs.base_model.set_adapter(order)
        got = H.run(ours, batch)
        if not {"several", "outputs"} & set(case.disputed):
            H.close(got, H.run(theirs, batch), tolerance)
    if case.merges and not {"merge", "outputs"} & set(case.disputed):
        ours.merge_adapter()
        H.close(H.weighable(case, H.run(ours, batch)), H.weighable(case, got), tolerance)
        ours.unmerge_adapter()


@each_case(lambda c: c.second is not None and c.mixed is not None)
def test_mixed_batch(case, lib, ref, is_ref):
    """Each sample runs as if alone with its adapter; peft can do it for LoRA and trainable tokens."""
    if is_ref and not case.mixed:
        pytest.skip("peft does not run mixed batches of this method")
    theirs, ours = pair(ref, lib, case)
    batch, tolerance = H.without_labels(H.inputs(case, torch.float64)), H.tolerance(case, torch.float64)
    names = ["other", "default", "default" if case.prompt else "__base__", "other"]
    got = H.run(ours, batch, adapter_names=names)
    alone = {}
    for name in set(names) - {"__base__"}:
        ours.set_adapter(name)
        alone[name] = H.run(ours, batch)
    if "__base__" in names:
        with ours.disable_adapter():
            alone["__base__"] = H.run(ours, batch)
    of_samples = {k for k, v in got.items() if v.dim() and v.shape[0] == len(names)}
    assert of_samples
    want = {k: torch.stack([alone[name][k][i] for i, name in enumerate(names)]) for k in of_samples}
    H.close({k: got[k] for k in of_samples}, want, tolerance)
    if case.mixed:
        theirs.set_adapter("default")
        H.close(got, H.run(theirs, batch, adapter_names=names), tolerance)


@two
def test_deleting(case, lib, ref):
    theirs, ours = pair(ref, lib, case)
    H.MADE.clear()
    batch = H.inputs(case, torch.float64)
    before = H.run(ours, batch)
    for model in (theirs, ours):
        model.delete_adapter("other")
    H.same_names(ours.state_dict(), theirs.state_dict())
    assert list(ours.peft_config) == ["default"]
    H.close(H.run(ours, batch), before, H.tolerance(case, torch.float64))
    with pytest.raises(ValueError):
        ours.delete_adapter("other")


@each_case(lambda c: c.id in ("lora/linear/plain", "lora/linear/2d"))
@pytest.mark.parametrize("names", [["default"], ["default", "nobody", "other", "other"]], ids=["short", "unknown"])
def test_mixed_batch_refuses(case, names, lib):
    model = H.add(lib, H.adapt(lib, case), case, "other")
    with pytest.raises(ValueError):
        H.run(model, H.inputs(case), adapter_names=names)


COMBINATIONS = {
    "linear": {}, "cat": {}, "svd": {}, "ties": {"density": 0.5}, "ties_svd": {"density": 0.5},
    "magnitude_prune": {"density": 0.5}, "magnitude_prune_svd": {"density": 0.5}, "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5}, "dare_linear_svd": {"density": 0.5}, "dare_ties_svd": {"density": 0.5},
}
# peft is wrong for rsLoRA (too large by sqrt(r)) and draws DARE's masks otherwise with rank_pattern:
# tests/test_weighted.py
WEIGHTED = ("lora/linear/plain", "lora/conv2d/plain", "lora/embedding/plain",
            "lora/hf_conv1d/plain", "lora/bert_seq/plain", "lora/linear/rank_pattern")


@pytest.mark.parametrize("kind", COMBINATIONS)
@each_case(lambda c: c.id in WEIGHTED)
def test_add_weighted_adapter(case, kind, lib, ref):
    if "rank_pattern" in case.kwargs and kind in ("dare_linear", "dare_ties"):
        pytest.skip("other masks are drawn at equal seed")
    same_rank = not (kind == "cat" or kind.endswith("svd"))
    models = []
    for module in (ref, lib):
        model = H.adapt(module, case)
        H.add(module, model, case, "other", **({"r": case.kwargs["r"]} if same_rank else {}))
        models.append(model)
    theirs, ours = models
    H.move(theirs, case.scale, only=H.adapter_or_trainable)
    H.copy_values(theirs, ours)
    results = []
    for model in (theirs, ours):
        H.seed(2)
        try:
            model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=kind,
                                       **COMBINATIONS[kind])
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            results.append(error)
            continue
        model.set_adapter("sum")
        results.append(H.run(model, H.inputs(case)))
    theirs_result, ours_result = results
    if isinstance(theirs_result, Exception):
        assert lib is ref or isinstance(ours_result, lib.PeftError), "a refusal is a typed error"
        return
    if isinstance(ours_result, Exception):
        raise ours_result
    H.same_names(ours.state_dict(), theirs.state_dict())
    assert ours.peft_config["sum"].r == theirs.peft_config["sum"].r
    H.close(ours_result, theirs_result, 1e-4 if "svd" in kind else 2e-5)


@each_case(lambda c: c.id in ("ia3/linear/plain", "ia3/conv2d/plain", "ia3/linear/feedforward"))
def test_add_weighted_adapter_ia3(case, lib, ref):
    theirs, ours = H.pair(ref, lib, case, second=True)
    for model in (theirs, ours):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum")
        model.set_adapter("sum")
    H.close(H.run(ours, H.inputs(case)), H.run(theirs, H.inputs(case)), 2e-5)


BY_ID = {c.id: c for c in CASES}
MIXTURES = [("lora/linear/plain", "adalora/linear/plain"), ("adalora/linear/2d", "lora/linear/rslora"),
            ("lora/linear/lora_bias", "oft/linear/plain"), ("oft/linear/exact", "lora/linear/plain"),
            ("lora/conv2d/plain", "adalora/conv2d/plain"), ("lora/hf_conv1d/plain", "adalora/hf_conv1d/plain")]


@pytest.mark.parametrize("first, second", MIXTURES)
def test_adapters_of_different_methods(first, second, lib, ref):
    a, b = BY_ID[first], BY_ID[second]
    models = []
    for module in (ref, lib):
        H.seed(0)
        model = module.get_peft_model(a.base.build(), H.config(module, a), "one", mixed=True)
        assert type(model).__name__ == "PeftMixedModel"
        H.seed(1)
        model.add_adapter("two", H.config(module, b))
        models.append(model.eval())
    theirs, ours = models
    H.move(theirs, only=lambda n, p: ".one" in n or ".two" in n)
    H.copy_values(theirs, ours)
    theirs, ours = theirs.double(), ours.double()
    batch = H.inputs(a, torch.float64)
    for active in ("one", "two", ["one", "two"], ["two", "one"]):
        for model in (theirs, ours):
            model.set_adapter(active)
        H.close(H.run(ours, batch), H.run(theirs, batch), 1e-10)
        assert sorted(ours.active_adapters) == sorted(theirs.active_adapters)
    got, want = ours.merge_and_unload(), theirs.merge_and_unload()
    H.close(H.run(got, batch), H.run(want, batch), 1e-10)
