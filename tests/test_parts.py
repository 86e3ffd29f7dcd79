"""Merging part by part: the weights are those that `fold` gives, and no second weight is needed for it."""

import warnings

import pytest
import torch
from torch import nn

import minipeft
from benchmarks.measure import Run
from benchmarks.methods import METHODS, UNMERGEABLE, config
from minipeft.core import folding
from minipeft.core.adapter import Activation, Delta
from minipeft.core.folding import upcast
from minipeft.core.layer import layers

from .interop import harness as H
from .interop.cases import each_case

WIDTH = 1024  # 4 MiB in float32
FORMED = {  # what a method must form before any row of W' is known, of the size of a weight
    "c3a": "dW, which is circulant",
    "fourierft": "the spectrum, of whose columns each goes into every row",
    "frod": "S + diag(l)",
    "lokr": "dW, a Kronecker product",
    "randlora": "the random matrix times the trained ones, which is as large as the weight",
    "shira": "W', with single entries changed",
    "supertuning": "W', with single entries changed",
    "waveft": "dW, by a wavelet transform",
}
MERGED = [method for method in METHODS if method not in UNMERGEABLE]


def wanted(layer):
    """(W', b') of a layer in float32, as `fold` gives them for its weights as a whole."""
    adapter = layer.adapters["default"]
    with torch.no_grad(), upcast(adapter):
        W, b = layer.base.read()
        W, b = adapter.fold(W.float(), None if b is None else b.float())
        return layer.base.canonical(W).clone(), b if b is None else b.clone()


def check(model, dtype):
    """Every layer that can be merged in place becomes what `wanted` says, but for rounding. Returns how many did."""
    found = [layer for layer in layers(model) if layer.active_adapters and layer.merges_in_place(["default"])]
    for layer in found:
        W, b = wanted(layer)
        with torch.no_grad():
            layer.merge_in_place(["default"], trial=True)
            layer.merge_in_place(["default"])
        once = {"rtol": torch.finfo(dtype).eps, "atol": 2e-6 * float(W.abs().max())}
        torch.testing.assert_close(layer.base.leaf.weight.data, W.to(dtype), **once)
        if layer.base.stored()[1] is not None:
            torch.testing.assert_close(layer.base.leaf.bias.data, b.to(dtype), **once)
    return len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_case(lambda case: case.merges and not case.prompt)
def test_of_few_rows(case, dtype, monkeypatch):
    monkeypatch.setattr(folding, "PART", 1)
    check(H.move(H.adapt(minipeft, case), case.scale).to(dtype), dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", MERGED)
def test_of_sizes_that_parts_do_not_divide(method, dtype, bias, monkeypatch):
    monkeypatch.setattr(folding, "PART", 1 << 12)
    torch.manual_seed(0)
    sizes = [(320, 192), (192, 320), (320, 320)]
    base = nn.Sequential(*[nn.Linear(*size, bias) for size in sizes]).to(dtype)
    if method == "beft" and not bias:
        pytest.skip("nothing to merge into")
    options = {"ia3": {"feedforward_modules": ["0"]}, "vblora": {"vector_length": 64}}.get(method, {})
    chosen = config(minipeft, method, target_modules=["0", "1", "2"], **options)
    model = H.move(minipeft.get_peft_model(base, chosen))
    assert check(model.eval(), dtype) == 3


@pytest.mark.parametrize("method", MERGED)
def test_memory(method):
    """At most one weight and a tenth; and without anything of that size, where a method need not form it."""
    run = Run("methods", ["minipeft"], "cpu", WIDTH, 1, 1, 1, [], "eager")
    run.net = lambda: nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])
    model = run.adapted(minipeft, method)
    peak = run.peak(model.merge_and_unload) / (WIDTH**2 * 4 / 2**20)
    assert peak < (1.1 if method in FORMED else 0.7)


def twice(kind):
    """A class derived from an adapter's, of which all that it says of its effect counts twice."""
    if issubclass(kind, Activation):
        pre, adjoint = kind.pre, kind.adjoint
        pieces = {"pre": lambda self, x: 2 * pre(self, x), "adjoint": lambda self, rows: 2 * adjoint(self, rows)}
    elif issubclass(kind, Delta):
        pieces = {"delta": lambda self: 2 * kind.delta(self)}
    else:
        pieces = {"fold": lambda self, W, b: (2 * kind.fold(self, W, b)[0], b)}
    return type("Twice", (kind,), pieces)


@pytest.mark.parametrize("method", MERGED)
def test_what_a_derived_class_states_anew(method):
    torch.manual_seed(0)
    options = {"vblora": {"vector_length": 64}, "ia3": {"feedforward_modules": ["0"]}}.get(method, {})
    chosen = config(minipeft, method, target_modules=["0"], **options)
    model = H.move(minipeft.get_peft_model(nn.Sequential(nn.Linear(192, 192)), chosen)).eval()
    (layer,) = layers(model)
    adapter = layer.adapters["default"]
    adapter.__class__ = twice(type(adapter))
    W, _ = wanted(layer)
    torch.testing.assert_close(model.merge_and_unload()[0].weight.data, W, rtol=1e-5, atol=2e-6 * float(W.abs().max()))


@pytest.mark.parametrize("method", ["lora", "ia3", "beft"])
def test_of_no_features(method):
    chosen = config(minipeft, method, target_modules=["0"], **({"feedforward_modules": []} if method == "ia3" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of tensors without elements
        base = nn.Sequential(nn.Linear(0, 4))
        assert minipeft.get_peft_model(base, chosen).merge_and_unload()(torch.zeros(2, 0)).shape == (2, 4)
