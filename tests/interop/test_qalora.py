"""QA-LoRA: on GPTQ layers, and the plain LoRA that use_qalora leaves on all others.

gptqmodel is not needed: a layer made here stands in for its own, with weights packed as GPTQ packs them.
"""

import importlib.machinery
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from . import bases as B
from . import harness as H
from .cases.case import Case


class BaseQuantLinear(nn.Module):
    SUPPORTS_METHODS = ["gptq"]


class PackedLinear(BaseQuantLinear):
    """4-bit integers, eight to an int32 along the inputs; W = scale (q - zero), by groups of 8 inputs."""

    def __init__(self, n_in, n_out, bias=True):
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        q = torch.randint(0, 16, (n_in // 8, 8, n_out), dtype=torch.int32)
        self.register_buffer("qweight", sum(q[:, i] << 4 * i for i in range(8)).to(torch.int32))  # (in / 8, out)
        self.register_buffer("scales", 0.02 + 0.02 * torch.rand(n_in // 8, n_out))
        self.register_buffer("zeros", torch.randint(6, 10, (n_in // 8, n_out)))
        self.bias = nn.Parameter(0.1 * torch.randn(n_out), requires_grad=False) if bias else None

    def dequantize_weight(self):
        q = torch.stack([self.qweight >> 4 * i & 15 for i in range(8)], 1)  # (in / 8, 8, out)
        return (self.scales[:, None] * (q - self.zeros[:, None])).flatten(0, 1)  # (in, out)

    def forward(self, x):
        y = x @ self.dequantize_weight().to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class HalfLinear(PackedLinear):
    """gptqmodel's layers say in `weight` what they dequantise to."""

    @property
    def weight(self):
        return types.SimpleNamespace(dtype=torch.bfloat16, device=self.qweight.device)


def _net():
    return B.Chain(square=PackedLinear(16, 16), wide=PackedLinear(16, 24, bias=False), thin=PackedLinear(24, 8),
                   plain=nn.Linear(8, 6))


NET = B.Base("gptq", _net, B.floats(B.BATCH, 3, 16))
HALF = B.Base("gptq_half", lambda: B.Chain(wide=HalfLinear(16, 24)), B.floats(B.BATCH, 3, 16))
NET_2D = B.Base("gptq2d", _net, B.floats(B.BATCH, 16))
PACKED = ["square", "wide", "thin"]


@pytest.fixture(autouse=True)
def gptqmodel(monkeypatch):
    """What both implementations look for."""
    peft = pytest.importorskip("peft")
    peft.import_utils.is_gptqmodel_available()  # remembers that the real one is not there
    for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.BaseQuantLinear = BaseQuantLinear
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("peft.tuners.lora.gptq.is_gptqmodel_available", lambda: True)


def case(base=NET, targets=PACKED, **fields):
    kwargs = {"target_modules": targets, "use_qalora": True, "qalora_group_size": 4, "r": 4, "lora_alpha": 6, **fields}
    return Case("qalora/here", "LoraConfig", kwargs, base)


def live(model):
    """State by name; peft lists a GPTQ layer a second time as `quant_linear_module`."""
    return {name: t for name, t in model.state_dict().items() if ".quant_linear_module." not in name}


def pair(ref, lib, case, dtype=torch.float64, second=None):
    models = []
    for module in (ref, lib):
        model = H.adapt(module, case)
        if second is not None:
            H.add(module, model, case, "other", **second)
        models.append(model)
    theirs, ours = models
    H.move(theirs, only=H.adapter_or_trainable)
    values = live(theirs)
    H.same_names(live(ours), values)
    ours.load_state_dict(values)
    return theirs.to(dtype), ours.to(dtype)


VARIATIONS = {
    "plain": {},
    "2d": {"base": NET_2D},
    "pairs": {"qalora_group_size": 2},
    "one_group": {"qalora_group_size": 8, "use_rslora": True},
    "lora": {"use_qalora": False},
    "lora_bias": {"use_qalora": False, "lora_bias": True},
    "init_false": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.4},
    "patterns": {"rank_pattern": {"wide": 3}, "alpha_pattern": {"thin": 5}},
    "beside_linear": {"targets": [*PACKED, "plain"]},
}
each = pytest.mark.parametrize("fields", VARIATIONS.values(), ids=VARIATIONS)


@each
def test_new_adapter(fields, lib, ref):
    """Names, shapes, dtypes, initial values and the trainable set."""
    theirs, ours = (H.adapt(module, case(**fields)) for module in (ref, lib))
    H.identical(live(ours), live(theirs))
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (ours, theirs)]
    assert sorted(trained[0]) == sorted(trained[1])
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast, lib, ref):
    one = case(HALF, ["wide"])
    theirs, ours = (H.adapt(module, one, autocast_adapter_dtype=autocast) for module in (ref, lib))
    H.identical(live(ours), live(theirs))
    wanted = torch.float32 if autocast else torch.bfloat16
    assert ours.base_model.model.wide.lora_A["default"].weight.dtype == wanted


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_output_and_gradients(fields, dtype, lib, ref):
    theirs, ours = pair(ref, lib, case(**fields), torch.float32)
    if dtype == torch.float64:
        theirs, ours = theirs.double(), ours.double()
    else:  # a bfloat16 model around float32 adapters
        for model in (theirs, ours):
            for name, p in model.named_parameters():
                p.data = p.data if "lora_" in name else p.data.to(dtype)
    batch = case(**fields).base.inputs(dtype)
    H.close(H.run(ours, batch), H.run(theirs, batch), H.TOLERANCE[dtype])
    if dtype == torch.float64:
        grads = []
        for model in (ours, theirs):
            H.seed(3)
            grads.append(H.gradients(model.train(), batch))
        H.close(*grads, 1e-10)
        with ours.eval().disable_adapter():
            H.close(H.run(ours, batch), H.run(case(**fields).base.build(dtype), batch), 1e-12)


@each
@pytest.mark.parametrize("ours_first", [True, False])
def test_checkpoints(fields, ours_first, lib, ref, tmp_path):
    theirs, ours = pair(ref, lib, case(**fields), torch.float32)
    writer, reader = (ours, ref) if ours_first else (theirs, lib)
    batch = case(**fields).base.inputs()
    H.saved(writer, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = reader.PeftModel.from_pretrained(case(**fields).base.build(), tmp_path).eval()
    H.close(H.run(again, batch), H.run(writer, batch), 2e-5)


def test_saved_alike(lib, ref, tmp_path):
    theirs, ours = pair(ref, lib, case(), torch.float32)
    (got, config), (want, reference) = H.saved(ours, tmp_path / "ours"), H.saved(theirs, tmp_path / "theirs")
    H.identical(got, want)
    H.same_config(config, reference)
    assert got["base_model.model.wide.lora_A.weight"].shape == (4, 16 // 4)


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]])
def test_two_adapters(active, lib, ref):
    theirs, ours = pair(ref, lib, case(), second={"qalora_group_size": 8, "r": 2})
    for model in (theirs, ours):
        model.base_model.set_adapter(active)
    H.close(H.run(ours, NET.inputs(torch.float64)), H.run(theirs, NET.inputs(torch.float64)), 1e-10)


def test_mixed_batch(lib, is_ref):
    if is_ref:
        pytest.skip("peft's GPTQ layer takes no adapter_names")
    model = H.add(lib, H.adapt(lib, case()), case(), "other", r=2)
    model = H.move(model, only=H.adapter_or_trainable).double()
    batch = NET.inputs(torch.float64)
    names = ["default", "other", "__base__", "default"]
    got = H.run(model, batch, adapter_names=names)["output"]
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = H.run(model, batch)["output"]
    with model.disable_adapter():
        alone["__base__"] = H.run(model, batch)["output"]
    assert len({float(t[0].sum()) for t in alone.values()}) == 3
    torch.testing.assert_close(got, torch.stack([alone[name][i] for i, name in enumerate(names)]))


@pytest.mark.parametrize("fields", [{}, {"use_qalora": False}])
def test_running_is_applying_what_is_read_and_merging_is_refused(fields, lib, is_ref):
    if is_ref:
        pytest.skip("peft has no weight for it, and no merge either")
    model = H.move(H.adapt(lib, case(**fields))).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    layer = model.base_model.model.wide
    read = layer.base.apply(x, *layer.operator().read())
    torch.testing.assert_close(layer(x), read, rtol=1e-12, atol=1e-12)
    assert (layer(x) - layer.base_layer(x)).abs().max() > 0.01
    before = H.snapshot(model)
    for act in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(ValueError, match="GPTQ"):
            act()
        H.identical(H.snapshot(model), before)


def test_delta_is_constant_within_a_group(lib, is_ref):
    if is_ref:
        pytest.skip("peft has no get_delta_weight for it")
    model = H.move(H.adapt(lib, case())).double()
    layer = model.base_model.model.wide
    delta = (layer.operator().read()[0] - layer.base.read()[0]).unflatten(1, (4, 4))  # (out, k, g)
    torch.testing.assert_close(delta, delta[..., :1].expand_as(delta))
    assert not torch.allclose(delta[:, 0], delta[:, 1])


@pytest.mark.parametrize("bad", [{"qalora_group_size": 5}, {"qalora_group_size": 0}, {"lora_bias": True},
                                 {"init_lora_weights": "orthogonal"}, {"use_dora": True}])
def test_refused(bad, lib, is_ref):
    if is_ref:
        pytest.skip("peft leaves a bias unused, and divides by zero")
    base = NET.build()
    before = H.snapshot(base)
    with pytest.raises(ValueError):
        H.adapt(lib, case(**bad), base=base)
    H.identical(H.snapshot(base), before)


def test_one_warning_names_the_plain_layers(lib, is_ref):
    if is_ref:
        pytest.skip("peft says nothing")
    config = lib.LoraConfig(**case(targets=["wide", "plain"]).kwargs)
    with pytest.warns(UserWarning, match="plain LoRA: plain") as caught:
        lib.get_peft_model(NET.build(), config)
    assert len([w for w in caught if "use_qalora" in str(w.message)]) == 1


def test_status(lib, is_ref):
    if is_ref:
        pytest.skip("peft asks the real gptqmodel")
    status = H.adapt(lib, case(targets=["wide", "plain"])).get_layer_status()
    assert {s.name: s.quantization_backend for s in status} == {"model.wide": "gptq", "model.plain": None}


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, lib, ref):
    """A plain LoRA, in peft as here."""
    models = []
    for module in (ref, lib):
        net = B.Chain(lin=H.quantised_linear(bits))
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = bits == 4, bits == 8
        config = module.LoraConfig(target_modules=["lin"], use_qalora=True, r=4)
        models.append(H.move(module.get_peft_model(net, config)).train())
    theirs, ours = (dict(m.named_parameters()) for m in models)
    assert ours["base_model.model.lin.lora_A.default.weight"].shape == (4, 64)
    H.identical({n: p for n, p in ours.items() if "lora" in n}, {n: p for n, p in theirs.items() if "lora" in n})
    x = torch.randn(5, 64)
    torch.testing.assert_close(models[1](x), models[0](x), rtol=1e-3, atol=1e-3)
