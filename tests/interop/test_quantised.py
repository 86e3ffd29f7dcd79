"""Every method on quantised linear layers: running, merging, unmerging to the bit, starting, saving, copying.

Packed 4-bit numbers are stored as bytes or as floating numbers (`bnb_4bit_quant_storage`), torchao's int8 weights look
like floating ones: what a layer's dtype says must decide nothing.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from . import harness as H
from .cases import CASES

KINDS = {  # name -> the largest error of a rounded weight, as a share of the largest weight
    "bnb nf4 in bfloat16": 0.16,
    "bnb nf4 in float32": 0.16,
    "bnb int8": 0.006,
    "torchao int8": 0.006,
}
FIRST = {}  # one case of each method on linear layers, and each start that changes the weight
for _case in CASES:
    if _case.merges and _case.base.name == "mlp" and _case.config != "LNTuningConfig":
        _start = _case.kwargs.get("init_lora_weights")
        if "niter" not in str(_start):  # a randomised SVD, never twice the same
            FIRST.setdefault((_case.method, _start if isinstance(_start, str) else ""), _case)
REFUSE = {"kasa": "truncates the weights of plain"}  # method -> why it cannot be added
each = pytest.mark.parametrize("case", FIRST.values(), ids=[c.id for c in FIRST.values()])
each_kind = pytest.mark.parametrize("kind", KINDS)


def quantised(base, kind):
    """`base`, its linear layers quantised as `kind` says."""
    if kind.startswith("torchao"):
        ao = pytest.importorskip("torchao.quantization")
        ao.quantize_(base, ao.Int8WeightOnlyConfig())
        return base
    bnb = pytest.importorskip("bitsandbytes")
    for name, plain in list(base.named_modules()):
        if type(plain) is nn.Linear and name != "head":  # whose rows are too few for float32
            size, bias = (plain.in_features, plain.out_features), plain.bias is not None
            if kind == "bnb int8":
                made = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
            else:
                storage = getattr(torch, kind.split()[-1])
                options = {"compute_dtype": torch.float32, "quant_type": "nf4", "quant_storage": storage}
                made = bnb.nn.Linear4bit(*size, bias=bias, **options)
            made.load_state_dict(plain.state_dict())
            setattr(base, name, made.to("cpu"))
    return base


def adapted(lib, case, kind):
    try:
        return H.move(H.adapt(lib, case, quantised(case.base.build(), kind)), case.scale)
    except ValueError as error:
        assert REFUSE.get(case.method, "none") in str(error), error
        pytest.skip("the method is not for quantised layers")


def run(model, case):
    """The output; with gradients, so that no CPU repacks what it runs."""
    batch = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in H.inputs(case).items()}
    return {k: v.detach().clone() for k, v in H.tensors(H.call(model, batch)).items()}


def bits(model):
    """Every bit of the frozen weights, and of what belongs to them."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and not any(part.startswith(("lora_", "adapter_")) for part in name.split(".")):
            weight = m.weight
            if (state := getattr(weight, "quant_state", None)) is not None:
                parts = {k: v for k, v in state.as_dict(packed=False).items() if torch.is_tensor(v)}
            elif hasattr(weight, "qdata"):
                weight, parts = weight.qdata, {"scale": weight.scale}
            elif weight.dtype == torch.int8:
                parts = {"SCB": m.state.SCB if weight.SCB is None else weight.SCB}
            else:
                parts = {}
            found |= {f"{name}.{k}": H.bits(v.data) for k, v in {**parts, "weight": weight, "bias": m.bias}.items()
                      if v is not None}
    return found


def layers(model):
    return [m for m in model.modules() if hasattr(m, "merged_adapters") and getattr(m.base, "packed", False)]


@pytest.mark.parametrize("kind", ["bnb nf4 in bfloat16", "torchao int8"])
@each
def test_merging(case, kind, lib, is_ref):
    """The merged weight is the sum, rounded once; unmerging gives every bit back."""
    if is_ref:
        pytest.skip("peft's layers have no operators")
    model = adapted(lib, case, kind)
    want, before = run(model, case), bits(model)
    with torch.no_grad():
        sums = [(layer, layer.operator().read()[0]) for layer in layers(model)]
    assert sums
    copied = copy.deepcopy(model)
    for safe in False, True:
        model.merge_adapter(safe_merge=safe)
        for layer, W in sums:
            merged = layer.base.current()[0]
            assert merged.shape == W.shape
            assert (merged - W).abs().max() <= KINDS[kind] * W.abs().max()
        assert bits(model) != before
        merged = run(model, case)
        twin = copy.deepcopy(model)
        model.unmerge_adapter()
        assert bits(model) == before
        H.identical(run(model, case), want)
        H.identical(run(twin, case), merged)
        twin.unmerge_adapter()
        assert bits(twin) == before
    plain = copied.merge_and_unload()
    H.identical(run(plain, case), merged)


@each
def test_saved(case, lib, tmp_path):
    """An adapter that is saved and loaded into the same frozen layers gives the same output."""
    kind = "bnb nf4 in bfloat16"
    model = adapted(lib, case, kind)
    want = run(model, case)
    model.save_pretrained(str(tmp_path))
    again = lib.PeftModel.from_pretrained(quantised(case.base.build(), kind), str(tmp_path)).eval()
    H.close(run(again, case), want, 1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "torchao" not in kind])  # whose layers have no pickles
def test_pickled(kind, lib, is_ref):
    """bitsandbytes' weights come back from a pickle as plain parameters, which still are read and merged rightly."""
    if is_ref:
        pytest.skip("peft takes such a weight for a matrix")
    case = FIRST["lora", ""]
    model = adapted(lib, case, kind)
    want = run(model, case)
    before = [layer.base.current()[0] for layer in layers(model)]
    model.merge_adapter()
    merged = run(model, case)
    model.unmerge_adapter()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False):
        H.identical(run(twin, case), want)
        assert all(map(torch.equal, before, (layer.base.current()[0] for layer in layers(twin))))
        twin.merge_adapter()
        H.identical(run(twin, case), merged)
        twin.unmerge_adapter()
        H.identical(run(twin, case), want)


@each_kind
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts(start, kind, lib, is_ref):
    """Such a start takes s B A out of the frozen weight: with it, the layer is what it was, but for the rounding."""
    if is_ref:
        pytest.skip("peft's layers have no operators")
    base = quantised(FIRST["lora", ""].base.build(), kind)
    W = dict(base.named_children())
    torch.manual_seed(0)
    config = lib.LoraConfig(r=2, target_modules=["square", "wide", "thin"], init_lora_weights=start)
    plain = {name: layer.base.current()[0] for name, layer in named(lib, copy.deepcopy(base), config, True).items()}
    started = named(lib, base, config)
    for name, layer in started.items():
        assert type(layer.base_layer) is type(W[name])
        whole, rest = layer.operator().read()[0], layer.base.current()[0]
        assert (rest - plain[name]).abs().max() > 0.05 * plain[name].abs().max()  # something was taken out
        assert (whole - plain[name]).abs().max() <= 1.1 * KINDS[kind] * rest.abs().max()


def named(lib, base, config, plainly=False):
    """The adapted layers by name; `plainly`: with LoRA's usual start."""
    if plainly:
        config = copy.deepcopy(config)
        config.init_lora_weights = True
    lib.get_peft_model(base, config)
    return {name: layer for name, layer in base.named_children() if hasattr(layer, "merged_adapters")}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "nf4" in kind])
def test_loftq_start_is_refused(kind, lib):
    base = quantised(FIRST["lora", ""].base.build(), kind)
    config = lib.LoraConfig(target_modules=["square"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    before = bits(base)
    with pytest.raises(ValueError, match="quantised already"):
        lib.get_peft_model(base, config)
    assert bits(base) == before
