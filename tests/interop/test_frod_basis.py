"""FRoD's shared basis V: what is loaded counts, also where another machine would have chosen other signs for it."""

import warnings

import pytest
import torch
from torch import nn

import minipeft

from . import bases as B
from . import harness as H
from .cases.case import Case

CASE = Case("frod/basis", "FrodConfig", {"target_modules": ["q", "up"], "sparse_rate": 0.1, "progressbar": False},
            B.STACK)


def turned(tensors):
    """A checkpoint's tensors as a machine would have written them that chose other signs for every third column of V.

    Of S, an entry changes its sign when it stands between a turned and an unturned column; W' stays as it is.
    """
    new = {k: t.clone() for k, t in tensors.items()}
    for key in (k for k in tensors if ".frod_V." in k):
        signs = torch.ones(len(tensors[key]))
        signs[::3] = -1
        new[key] = tensors[key] * signs
        name = key.rpartition(".")[2]
        row, column = tensors[f"base_model.frod_s_indices.{name}"]
        for k in (k for k in tensors if f".{name}." in k and k.endswith("frod_lambda_s_values")):
            new[k] = tensors[k] * signs[row] * signs[column]
    return new


def outputs(lib):
    """Of a moved model; of it with the turned checkpoint written into it; of a new model with that checkpoint."""
    model = H.move(H.adapt(lib, CASE), 0.3)
    before = H.run(model, H.inputs(CASE))
    state = turned(lib.get_peft_model_state_dict(model))
    lib.set_peft_model_state_dict(model, {k: t.clone() for k, t in state.items()})
    other = H.adapt(lib, CASE)
    lib.set_peft_model_state_dict(other, state)
    return before, H.run(model, H.inputs(CASE)), H.run(other, H.inputs(CASE))


def test_other_signs(lib, ref):
    before, *after = outputs(lib)
    for y in after:
        H.close(y, before, 1e-5)
    before, *after = outputs(ref)
    assert all(H.differ(y, before, 1e-2) for y in after), "peft keeps the U of the V that it made itself"


def test_other_signs_from_a_folder(lib, tmp_path):
    model = H.move(H.adapt(lib, CASE), 0.3)
    before = H.run(model, H.inputs(CASE))
    lib.set_peft_model_state_dict(model, turned(lib.get_peft_model_state_dict(model)))
    H.saved(model, tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = lib.PeftModel.from_pretrained(CASE.base.build(), str(tmp_path), **options).eval()
        H.close(H.run(again, H.inputs(CASE)), before, 1e-5)


def test_second_adapter_has_its_own_rate(lib):
    """peft gives it as many entries as the first has, so that its checkpoints cannot be loaded beside each other."""
    model = H.adapt(lib, CASE)
    H.add(lib, model, CASE, "other", sparse_rate=0.5)
    boxes = model.base_model.shared_slots()
    assert [len(t[0]) for t in boxes["frod_s_indices.q"].values()] == [6, 32]
    V = boxes["frod_V.q"]
    assert torch.equal(V["default"], V["other"])


def test_loading_one_adapter_leaves_the_other(lib):
    model = H.move(H.add(lib, H.adapt(lib, CASE), CASE, "other"), 0.3, only=H.adapter_or_trainable)
    model.set_adapter("default")
    before = H.run(model, H.inputs(CASE))
    state = turned(lib.get_peft_model_state_dict(model, adapter_name="other"))
    lib.set_peft_model_state_dict(model, state, adapter_name="other")
    H.close(H.run(model, H.inputs(CASE)), before, 0)


def test_one_width_for_a_group():
    net = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(
        torch.nn.ModuleDict({"q": torch.nn.Linear(width, 4)}) for width in (4, 6)
    )})
    with pytest.raises(minipeft.errors.ConfigError, match=r"'layers.1.q' has 6 inputs"):
        minipeft.get_peft_model(net, minipeft.FrodConfig(target_modules=["q"], progressbar=False))
    assert type(net["layers"][0]["q"]) is torch.nn.Linear


def test_unused_checkpoint_tensors_are_said(tmp_path):
    H.saved(H.adapt(minipeft, CASE), tmp_path)
    config = minipeft.FrodConfig(**{**CASE.kwargs, "save_projection": False})
    with pytest.warns(minipeft.PeftWarning, match="are not used"):
        minipeft.PeftModel.from_pretrained(CASE.base.build(), str(tmp_path), config=config)


def test_attention():
    """Both projections of nn.MultiheadAttention stand at one path, so they share V."""
    torch.manual_seed(0)
    net = B.ATTENTION.build(torch.float64)
    config = minipeft.FrodConfig(target_modules=["attn"], sparse_rate=0.2, progressbar=False)
    model = minipeft.get_peft_model(net, config)
    x = B.ATTENTION.inputs(torch.float64)
    plain = H.run(model, x)
    H.move(model, 0.3)
    y = H.run(model, x)
    assert H.differ(y, plain, 1e-2)
    model.merge_adapter()
    H.close(H.run(model, x), y, 1e-10)


def test_progress_bar(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minipeft.get_peft_model(CASE.base.build(), minipeft.FrodConfig(target_modules=["q", "up"]))
    assert "FRoD: decomposing weights: 2/2" in capfd.readouterr().err


def test_adapters_of_one_model_share_what_is_drawn(lib):
    """In memory, until a checkpoint gives one of them another V; the other stays as it was."""
    config = lambda: lib.FrodConfig(target_modules=["0", "1"], init_weights=False)
    net = lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    model, x = lib.get_peft_model(net(), config()), torch.randn(2, 6)
    model.add_adapter("other", config())
    layer, y = model.base_model.model[0], model(x)
    for slot in (layer.frod_V, layer.frod_s_indices):
        assert slot["default"].data_ptr() == slot["other"].data_ptr()
    state = lib.get_peft_model_state_dict(lib.get_peft_model(net(), config()))
    lib.set_peft_model_state_dict(model, state, "other")
    assert torch.equal(model(x), y) and not torch.equal(layer.frod_V["default"], layer.frod_V["other"])
