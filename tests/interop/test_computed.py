"""Layers whose weight is computed: by torch.nn.utils.parametrize, or by a forward pre-hook.

Adapters run on the weight that is computed. Merging writes through where that can be inverted, and unmerging restores
every bit; where it cannot, merging and starts that change the weight are refused with nothing changed.
"""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from . import harness as H
from .cases import CASES

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
BASES = ("mlp", "conv2d", "conv2d_groups", "embedding", "hf_conv1d")
CLOSE = 2e-5
FIRST = {}  # one case of each method and base model, and each start that changes the weight
for _case in CASES:
    if _case.merges and _case.base.name in BASES and _case.config != "LNTuningConfig":
        _start = str(_case.kwargs.get("init_lora_weights"))
        if _start in ("None", "True", "pissa", "olora"):
            FIRST.setdefault((_case.method, _case.base.name, _start), _case)
FEW = [c for c in FIRST.values() if c.method in ("lora", "boft", "dora") and c.base.name in ("mlp", "conv2d")]


class Doubled(nn.Module):
    def forward(self, X):
        return 2 * X

    def right_inverse(self, X):
        return X / 2


class Squashed(nn.Module):
    """Cannot be inverted."""

    def forward(self, X):
        return torch.tanh(X)


class Clipped(nn.Module):
    """Has an inverse that is right for some weights only."""

    def forward(self, X):
        return X.clamp(-0.1, 0.1)

    def right_inverse(self, X):
        return X


def by(*steps):
    def wrap(layer):
        for step in steps:
            step(layer) if not isinstance(step, type) else parametrize.register_parametrization(layer, "weight", step())
        return layer

    return wrap


INVERTED = {
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "weight_norm": weight_norm,
    "doubled": by(Doubled),
    "doubled weight_norm": by(parametrizations.weight_norm, Doubled),
}
REFUSED = {
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "spectral_norm": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "householder": lambda m: parametrizations.orthogonal(m, orthogonal_map="householder", use_trivialization=False),
    "cayley": lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley", use_trivialization=False),
    "squashed": by(Squashed),
    "clipped": by(Clipped),
    "clipped weight_norm": by(parametrizations.weight_norm, Clipped),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


def wrapped(case, wrap):
    """The case's base model with each weight computed, and the same with these weights as parameters."""
    made, plain = case.base.build(), case.base.build()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # torch deprecates the hooks
        for _, layer in layers(made):
            wrap(layer)
    with torch.no_grad():
        made(**case.base.inputs())  # a hook computes when the layer runs; so made, its tensors can be copied
        for name, layer in layers(made):
            plain.get_submodule(name).weight.copy_(layer.weight)
    return made, plain


def layers(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, KINDS) or m._get_name().endswith("Conv1D")]


def adapted(lib, case, wrap):
    return [H.move(H.adapt(lib, case, base), case.scale) for base in wrapped(case, wrap)]


def run(model, case):
    return H.weighable(case, H.run(model, H.inputs(case)))


def each(cases, kinds):
    pairs = [(case, kind) for case in cases for kind in kinds]
    return pytest.mark.parametrize("case, kind", pairs, ids=[f"{case.id}-{kind}" for case, kind in pairs])


@each([*FIRST.values()], ["parametrizations.weight_norm"])
def test_written_through(case, kind, lib, is_ref):
    check_written_through(case, kind, lib, is_ref)


@each(FEW, INVERTED)
def test_written_through_others(case, kind, lib, is_ref):
    check_written_through(case, kind, lib, is_ref)


def check_written_through(case, kind, lib, is_ref):
    if is_ref:
        pytest.skip("peft loses what it merges")
    model, plain = adapted(lib, case, INVERTED[kind])
    want, before = run(plain, case), H.snapshot(model)
    H.close(run(model, case), want, CLOSE)
    H.identical(H.snapshot(model), before)  # running reads only
    twin = copy.deepcopy(model)
    model.merge_adapter(safe_merge=True)
    H.close(run(model, case), want, CLOSE)
    assert not same(H.snapshot(model), before)
    model.unmerge_adapter()
    H.identical(H.snapshot(model), before)
    H.close(run(model, case), want, CLOSE)
    with torch.no_grad():
        for changed in model, twin:  # what the weight is computed from may change at any time
            for _, p in named_inputs(changed):
                p.mul_(1.5)
        for name, _ in layers(case.base.build()):
            layer = plain.get_base_model().get_submodule(name)
            getattr(layer, "base_layer", layer).weight.mul_(1.5)
    want = run(plain, case)
    H.close(run(model, case), want, CLOSE)
    merged = twin.merge_and_unload()
    H.close(run(merged, case), want, CLOSE)
    assert {n: type(m).__name__ for n, m in merged.named_modules()} == kinds(wrapped(case, INVERTED[kind])[0])


@each([c for c in FIRST.values() if c.method != "kasa"], ["parametrizations.spectral_norm"])  # kasa keeps that norm
def test_refused(case, kind, lib, is_ref):
    check_refused(case, kind, lib, is_ref)


@each(FEW, REFUSED)
def test_refused_others(case, kind, lib, is_ref):
    check_refused(case, kind, lib, is_ref)


def check_refused(case, kind, lib, is_ref):
    if is_ref:
        pytest.skip("peft loses what it merges")
    if starts_by_writing(lib, case):
        made, _ = wrapped(case, REFUSED[kind])
        before, was = H.snapshot(made), kinds(made)
        with pytest.raises(ValueError, match="The layer computes its weight"):
            H.adapt(lib, case, made)
        H.identical(H.snapshot(made), before)
        assert kinds(made) == was
        return
    model, plain = adapted(lib, case, REFUSED[kind])
    want, before = run(plain, case), H.snapshot(model)
    H.close(run(model, case), want, CLOSE)
    H.identical(H.snapshot(model), before)
    if case.config == "BeftConfig":  # whose weight stays what it is
        return
    for merge in (model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(ValueError, match="The layer computes its weight"):
            merge()
        H.identical(H.snapshot(model), before)
        assert not any(getattr(module, "merged_adapters", ()) for module in model.modules())
    H.close(run(model, case), want, CLOSE)


@pytest.mark.parametrize("kind", INVERTED)
def test_several_merged(kind, lib, is_ref):
    """Of two merged adapters one is taken out; the model is copied, cast, edited and loaded while one is in it."""
    if is_ref:
        pytest.skip("peft loses what it merges")
    case = FIRST["lora", "mlp", "None"]
    model, plain = adapted(lib, case, INVERTED[kind])
    for each in model, plain:
        H.move(H.add(lib, each, case, "other"), only=lambda name, p: ".other." in name)
        each.base_model.set_adapter(["default", "other"])
    before, both = H.snapshot(model), run(plain, case)
    plain.set_adapter("default")
    one = run(plain, case)
    model.merge_adapter()
    H.close(run(model, case), both, CLOSE)
    model.base_model.model.square.unmerge(["other"])
    model.unmerge_adapter()
    H.identical(H.snapshot(model), before)
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    H.close(run(model, case), both, CLOSE)
    for layer in model.modules():
        if hasattr(layer, "merged_adapters") and layer.merged_adapters:
            layer.unmerge(["other"])
    twin = copy.deepcopy(model)
    twin.set_adapter("default")  # which takes out what is merged
    H.identical(H.snapshot(twin), before)
    H.close(run(twin, case), one, CLOSE)
    twin = copy.deepcopy(model).double()
    twin.unmerge_adapter()
    H.identical(H.snapshot(twin), {name: tensor.double() for name, tensor in before.items()})
    frozen = {name: tensor for name, tensor in before.items() if "base_layer" in name and "bias" not in name}
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.load_state_dict(frozen, strict=False)
    with torch.no_grad():
        named_inputs(model)[0][1].mul_(1.5)
    with pytest.raises(ValueError, match="changed while an adapter was merged"):
        model.unmerge_adapter()


def named_inputs(model):
    """Of each weight that is computed, the parameter that it is proportional to."""
    ends = ("weight_g", "weight.original", "weight.original0")
    found = [(name, p) for name, p in model.named_parameters() if name.endswith(ends)]
    assert found
    return found


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, spectral_norm])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(2, 3, 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_training_advances_as_without_an_adapter(wrap, layer, fields, lib):
    """A pass in train mode advances a power iteration once, whatever the adapter reads, and adding one not at all."""
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(fc=wrap(layer())))
    x = torch.randn(4, 6) if isinstance(base.fc, nn.Linear) else torch.randn(4, 2, 4, 4)
    base.train()(x)  # a hook has computed its weight
    with torch.no_grad():
        base(x)
    alone = copy.deepcopy(base)
    model = lib.get_peft_model(base, lib.LoraConfig(target_modules=["fc"], r=2, **fields)).train()
    for _ in range(3):
        got, want = model(x), alone(x)
        if not fields:  # DoRA's magnitudes stay those of the first pass
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    kept, want = dict(base.fc.base_layer.named_buffers()), dict(alone.fc.named_buffers())
    assert kept and all(torch.equal(kept[name], tensor) for name, tensor in want.items())


def test_lora_ga_is_refused(lib, is_ref):
    if is_ref:
        pytest.skip("peft finds out later")
    base = nn.Sequential(OrderedDict(fc=parametrizations.weight_norm(nn.Linear(6, 5))))
    config = lib.LoraConfig(target_modules=["fc"], init_lora_weights="lora_ga", lora_ga_config=lib.LoraGAConfig())
    with pytest.raises(ValueError, match="computes its weight"):
        lib.preprocess_loraga(base, config, lambda: None)


def starts_by_writing(lib, case):
    return lib.adapter.adapter_class(H.config(lib, case)).changes_base(H.config(lib, case))


def kinds(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


def same(a, b):
    try:
        H.identical(a, b)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("method, fields", [("Beft", {}), ("Lora", {"lora_bias": True, "init_lora_weights": False})])
def test_a_bias_that_is_computed(method, fields, how, lib, is_ref):
    if is_ref:
        pytest.skip("peft writes to what is computed anew each time")
    base = nn.Sequential(OrderedDict(fc=nn.Linear(6, 5)))
    parametrize.register_parametrization(base.fc, "bias", Doubled())
    model = lib.get_peft_model(base, getattr(lib, f"{method}Config")(target_modules=["fc"], **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    x = torch.randn(3, 6)
    want = model(x)
    with pytest.raises(NotImplementedError, match="computes its bias by Doubled"):
        getattr(model.base_model, how)()
    assert torch.equal(model(x), want)
