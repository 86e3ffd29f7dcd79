"""LoftQ: peft's A, B and rounded weights, and what quantising took away made good on 4-bit layers."""

import inspect
import json

import pytest
import torch
from torch import nn

from . import harness as H

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
save_file = pytest.importorskip("safetensors.torch").save_file
pytestmark = pytest.mark.bnb


@pytest.fixture
def on_cpu(ref, monkeypatch):
    """peft computes LoftQ on CUDA alone; here its code computes on the CPU."""
    from peft.tuners.lora import layer
    from peft.utils import loftq_utils

    for name in ("loftq_init", "_loftq_init_new"):
        code = inspect.getsource(getattr(loftq_utils, name)).replace('"cuda"', '"cpu"')
        made = dict(vars(loftq_utils))
        exec(compile(f"from __future__ import annotations\n{code}", name, "exec"), made)
        monkeypatch.setattr(loftq_utils, name, made[name])
    monkeypatch.setattr(layer, "loftq_init", loftq_utils.loftq_init)
    return ref


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 96, bias=False))


def config(lib, bits=4, steps=1, **fields):
    loftq = lib.LoftQConfig(loftq_bits=bits, loftq_iter=steps)
    fields = {"target_modules": ["0", "2", "3"], "r": 8, "lora_alpha": 8, **fields}
    return lib.LoraConfig(init_lora_weights="loftq", loftq_config=loftq, **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits, steps", [(4, 1), (4, 3), (8, 1), (8, 2)])
def test_same_start(bits, steps, dtype, lib, on_cpu):
    theirs, ours = (m.get_peft_model(net().to(dtype), config(m, bits, steps)) for m in (on_cpu, lib))
    want, got = H.snapshot(theirs), H.snapshot(ours)
    H.same_names(got, want)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, weight in want.items():
        if "base_layer" in name:
            torch.testing.assert_close(got[name], weight, rtol=0, atol=tolerance)
        elif "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            a_b = [values[b].float() @ values[name].float() for values in (got, want)]
            torch.testing.assert_close(*a_b, rtol=0, atol=tolerance)
    changed = sum(
        (want[n] != net().to(dtype).state_dict()[k]).sum()
        for n, k in (
            ("base_model.model.0.base_layer.weight", "0.weight"),
            ("base_model.model.3.base_layer.weight", "3.weight"),
        )
    )
    assert changed > 1000


def test_nearer_to_the_full_weight_than_rounding(lib):
    for steps in (1, 5):
        model = lib.get_peft_model(net(), config(lib, steps=steps)).merge_and_unload()
        for i in (0, 2, 3):
            W = net()[i].weight
            rounded = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(W.data, quant_type="nf4"))
            assert (model[i].weight - W).norm() < 0.9 * (rounded - W).norm()


def test_saved_and_loaded(lib, on_cpu, tmp_path):
    x = torch.randn(4, 64)
    model = H.move(lib.get_peft_model(net(), config(lib, steps=2)))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["loftq_config"] == {
        "loftq_bits": 4, "loftq_iter": 2}  # fmt: skip
    for module in (lib, on_cpu):
        torch.testing.assert_close(module.PeftModel.from_pretrained(net(), tmp_path)(x), model(x), rtol=1e-4, atol=1e-4)


class FourBits(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.is_loaded_in_4bit = True
        self.model = nn.ModuleDict({name: self.layer(*size) for name, size in SIZES.items()})

    def layer(self, n_in, n_out):
        made = bnb.nn.Linear4bit(n_in, n_out, bias=False, compute_dtype=torch.float32, quant_type="nf4",
                                 compress_statistics=False)  # fmt: skip
        made.load_state_dict({"weight": full(n_in, n_out)})
        return made.to("cpu")

    def forward(self, x):
        return self.model["down"](torch.tanh(self.model["up"](x)))


SIZES = {"up": (64, 128), "down": (128, 64)}


def full(n_in, n_out):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(n_in)) / n_in**0.5


def on_disk(folder, kind):
    weights = {name: full(*size) for name, size in SIZES.items()}
    head = "" if kind == "without_prefix" else "model."
    if kind != "shards":
        save_file({f"{head}{name}.weight": W for name, W in weights.items()}, folder / "model.safetensors")
        return folder / "model.safetensors" if kind == "file" else folder
    places = {f"model.{name}.weight": f"model-{i}-of-2.safetensors" for i, name in enumerate(weights, 1)}
    for name, W in weights.items():
        save_file({f"model.{name}.weight": W}, folder / places[f"model.{name}.weight"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def four_bits(lib, **fields):
    torch.manual_seed(1)
    return lib.get_peft_model(FourBits(), lib.LoraConfig(target_modules=["up", "down"], r=8, **fields))


@pytest.mark.parametrize("kind", ["file", "folder", "shards", "without_prefix"])
def test_replaced_as_peft_replaces(kind, lib, on_cpu, tmp_path):
    path = on_disk(tmp_path, kind)
    theirs, ours = four_bits(on_cpu), four_bits(lib)
    on_cpu.replace_lora_weights_loftq(theirs, model_path=str(path))
    lib.replace_lora_weights_loftq(ours, model_path=str(path))
    for name in SIZES:
        pairs = []
        for model in (ours, theirs):
            layer = model.base_model.model.model[name]
            pairs.append(layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        torch.testing.assert_close(*pairs, rtol=0, atol=1e-5)
        assert pairs[0].abs().max() > 1e-3
    x = torch.randn(3, 64)
    exact = full(*SIZES["down"]) @ torch.tanh(full(*SIZES["up"]) @ x.T)
    with ours.disable_adapter():
        rounded = ours(x)
    assert (ours(x).T - exact).norm() < 0.95 * (rounded.T - exact).norm()


@pytest.mark.parametrize("keep", [["model.up"], [], ["model.down", "model.up"]])
def test_callback_decides(keep, lib, on_cpu, tmp_path):
    path, seen = str(on_disk(tmp_path, "file")), []

    def decide(model, name):
        seen.append(name)
        return name in keep

    for module in (lib, on_cpu):
        model = four_bits(module)
        module.replace_lora_weights_loftq(model, path, callback=decide)
        replaced = [n for n in SIZES if model.base_model.model.model[n].lora_B["default"].weight.any()]
        assert sorted(f"model.{n}" for n in replaced) == sorted(keep)
    assert seen == ["model.up", "model.down"] * 2


def test_refusals(lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("errors of the module under test")
    with pytest.raises(ValueError, match="4 or 8"):
        lib.get_peft_model(net(), config(lib, bits=3))
    with pytest.raises(ValueError, match="4 or 8"):
        lib.get_peft_model(net(), config(lib, steps=0))
    with pytest.raises(ValueError, match="replace_lora_weights_loftq"):
        lib.get_peft_model(FourBits(), config(lib, target_modules=["up"]))
    with pytest.raises(ValueError, match="linear"):
        lib.get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), config(lib, target_modules=["0"]))
    with pytest.raises(ValueError, match="4-bit"):
        lib.replace_lora_weights_loftq(lib.get_peft_model(net(), lib.LoraConfig(target_modules=["0"])), tmp_path)
    model = four_bits(lib)
    before = H.snapshot(model)
    with pytest.raises(ValueError, match="model_path"):
        lib.replace_lora_weights_loftq(model)
    with pytest.raises(ValueError, match="Could not find"):
        lib.replace_lora_weights_loftq(model, tmp_path)
    save_file({"up.weight": full(64, 128), "down.weight": full(64, 128)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"down.*\(128, 64\)"):
        lib.replace_lora_weights_loftq(model, tmp_path)
    save_file({"up.weight": full(64, 128)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'model\.down\.weight'"):
        lib.replace_lora_weights_loftq(model, tmp_path)
    H.identical(H.snapshot(model), before)
    with pytest.raises(ValueError, match="DoRA"):
        lib.replace_lora_weights_loftq(four_bits(lib, use_dora=True), tmp_path)
