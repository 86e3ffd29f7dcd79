"""Adapters on layers that torchao has quantised, as peft runs and merges them; what cannot be written is refused."""

import copy
import types

import pytest
import torch
from torch import nn

from . import harness as H

ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
INT8 = {
    "weights": lambda: ao.Int8WeightOnlyConfig(),
    "weights per tensor": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
    "weights and inputs": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
}
READ = {"intx": lambda: ao.IntxWeightOnlyConfig(), "float8": lambda: ao.Float8WeightOnlyConfig()}
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))


def network(made, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32, bias=False)).to(dtype)
    ao.quantize_(net, made())
    net.hf_quantizer = types.SimpleNamespace(  # where peft looks for how to quantise anew
        quantization_config=types.SimpleNamespace(get_apply_tensor_subclass=made)
    )
    return net


def adapted(lib, made, dtype=torch.float32, **fields):
    config = lib.LoraConfig(r=4, target_modules=["0", "2"], **fields)
    return H.move(lib.get_peft_model(network(made, dtype), config)).eval()


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear) and hasattr(m.weight, "qdata")]


def bits(model):
    return [H.bits(getattr(weight, name)) for weight in weights(model) for name in ("qdata", "scale")]


def run(model, dtype=torch.float32):
    with torch.no_grad():
        return model(X.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", [*INT8.values(), *READ.values()], ids=[*INT8, *READ])
def test_runs_as_peft(made, dtype, lib, ref):
    """Names, dtypes, initial values, outputs, gradients, and what is said of each layer."""
    theirs, ours = (adapted(module, made, dtype, use_rslora=True) for module in (ref, lib))
    got, want = (dict(model.named_parameters()) for model in (ours, theirs))
    assert list(got) == list(want)
    for name, p in want.items():
        assert (got[name].dtype, got[name].requires_grad) == (p.dtype, p.requires_grad), name
        assert not p.requires_grad or torch.equal(got[name], p), name
    outputs = []
    for model in (theirs, ours):
        y = model(X.to(dtype))
        (y * y).sum().backward()
        outputs.append(y)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-2)
    if dtype == torch.float32:
        for name, p in want.items():
            assert p.grad is None or torch.allclose(got[name].grad, p.grad, atol=1e-4), name
    told = [[row.module_type for row in model.get_layer_status()] for model in (theirs, ours)]
    assert told[0] == told[1]
    assert lib is ref or {row.quantization_backend for row in ours.get_layer_status()} == {"torchao"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", INT8.values(), ids=INT8)
def test_merges_as_peft(made, dtype, lib, ref, is_ref):
    """The integers are peft's, but for some that one rounding less turns over; unmerging restores them to the bit."""
    theirs, ours = (adapted(module, made, dtype) for module in (ref, lib))
    want, before = run(ours, dtype), bits(ours)
    for model in (theirs, ours):
        model.merge_adapter()
    for got, wanted, was in zip(weights(ours), weights(theirs), weights(network(made, dtype))):
        assert type(got) is type(wanted) and got.dtype == wanted.dtype and not got.requires_grad
        assert got.act_quant_kwargs == wanted.act_quant_kwargs and list(got.block_size) == list(wanted.block_size)
        assert (got.qdata != wanted.qdata).float().mean() < (0.002 if dtype == torch.float32 else 0.25)
        assert (got.qdata.int() - wanted.qdata.int()).abs().max() <= 1
        torch.testing.assert_close(got.scale, wanted.scale, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
        assert (got.qdata != was.qdata).any()
    torch.testing.assert_close(run(ours, dtype), want, rtol=0, atol=0.05)
    if is_ref:
        return
    twin = copy.deepcopy(ours)
    for model in (ours, twin):
        model.unmerge_adapter()
        assert bits(model) == before
        assert torch.equal(run(model, dtype), want)
    plain = ours.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(run(plain, dtype), want, rtol=0, atol=0.05)


@pytest.mark.parametrize("made", READ.values(), ids=READ)
def test_what_cannot_be_written_is_refused(made, lib, is_ref):
    """Running is all right; merging, and starts that change the weight, raise before anything changes."""
    if is_ref:
        pytest.skip("peft quantises anew where the model tells how")
    model = adapted(lib, made)
    want, before = run(model), bits(model)
    for merge in (model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(ValueError, match="Nothing can be merged into weights of torchao's kind"):
            merge()
        assert bits(model) == before
        assert torch.equal(run(model), want)
    net = nn.Sequential(nn.Linear(32, 32), *network(made))
    plain = net[0].weight.clone()
    for start in "pissa", "olora":
        with pytest.raises(ValueError, match="torchao's kind"):
            lib.get_peft_model(net, lib.LoraConfig(target_modules=["0", "1", "3"], init_lora_weights=start))
        assert bits(net) == before and torch.equal(net[0].weight, plain)
        assert all(isinstance(m, (nn.Linear, nn.Tanh)) for m in net)


def test_scaled_inputs(lib, is_ref):
    """SmoothQuant's and AWQ's weights stand behind a scale of the inputs, which belongs to the matrix."""
    if is_ref:
        pytest.skip("peft merges beside the scale")
    net, scale = network(INT8["weights"]), torch.rand(32) + 0.5
    made = ao.Int8Tensor.from_hp(net[0].weight.dequantize(), ao.PerRow(), act_pre_scale=scale)
    net[0].weight = nn.Parameter(made, requires_grad=False)
    model = H.move(lib.get_peft_model(net, lib.LoraConfig(target_modules=["0"], r=2))).eval()
    want, layer = run(model), model.base_model.model[0]
    torch.testing.assert_close(layer.base.apply(X, *layer.base.read()), layer.base_layer(X), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(run(model), want, rtol=0, atol=0.02)
    assert torch.equal(layer.base_layer.weight.act_pre_scale, scale)


def test_other_layers_are_refused(lib, is_ref):
    """Only nn.Linear is known to run with such a weight."""
    if is_ref:
        pytest.skip("peft finds out later")
    net = nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 4))
    ao.quantize_(net, ao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    with pytest.raises(ValueError, match="Embedding with a weight of class Int8Tensor"):
        lib.get_peft_model(net, lib.LoraConfig(target_modules=["0"]))
    assert type(net[0]) is nn.Embedding
    lib.get_peft_model(net, lib.LoraConfig(target_modules="all-linear"))
    assert type(net[0]) is nn.Embedding and type(net[1]) is not nn.Linear
