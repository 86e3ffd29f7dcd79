"""Another LoRA checkpoint in the place of an adapter."""

import copy
import importlib
import json

import pytest
import torch
from torch import nn

from . import harness as H
from .cases import each_case


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a = nn.Embedding(11, 16), nn.Linear(16, 8)
        self.conv, self.grouped = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, ids):
        x = torch.tanh(self.a(self.words(ids))).view(-1, 2, 4, 4)
        return self.grouped(torch.tanh(self.conv(x)))


IDS = torch.arange(16).view(2, 8) % 11
WHERE = {"minipeft": "minipeft.compat.hotswap", "peft": "peft.utils.hotswap"}


def base():
    torch.manual_seed(0)
    return Net()


def adapted(lib, r=4, seed=1, targets=("a", "conv", "grouped"), **fields):
    torch.manual_seed(seed)
    config = lib.LoraConfig(r=r, lora_alpha=2 * seed, target_modules=list(targets), init_lora_weights=False, **fields)
    return lib.get_peft_model(base(), config).eval()


@pytest.fixture
def hotswap(lib):
    return importlib.import_module(WHERE[lib.__name__])


def prepared(lib, hotswap, rank, r=4):
    model = adapted(lib, r)
    before = model(IDS)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=rank, config=model.peft_config)
    torch.testing.assert_close(model(IDS), before)
    assert model.peft_config["default"].r == rank
    assert isinstance(model.base_model.model.a.scaling["default"], torch.Tensor)
    return model


@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("rslora", [False, True])
def test_swap(rank, rslora, lib, ref, hotswap, tmp_path):
    """Smaller, equal and larger ranks; written by peft or by us."""
    for number, writer in enumerate((ref, lib)):
        new = adapted(writer, rank, seed=2 + number, use_rslora=rslora)
        new.save_pretrained(tmp_path / str(number))
        model = adapted(lib, 4, use_rslora=rslora)
        hotswap.hotswap_adapter(model, tmp_path / str(number), "default", torch_device="cpu")
        torch.testing.assert_close(model(IDS), new(IDS))


def test_fewer_layers(lib, hotswap, tmp_path):
    """The others are silent then."""
    new = adapted(lib, 4, seed=3, targets=["a"])
    new.save_pretrained(tmp_path)
    model = adapted(lib, 4)
    hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    torch.testing.assert_close(model(IDS), new(IDS))


def test_patterns(lib, is_ref, hotswap, tmp_path):
    if is_ref:
        pytest.skip("peft looks for rank_pattern and alpha_pattern in names that hold more than the layer's path")
    fields = {"rank_pattern": {"a": 2, "conv": 6}, "alpha_pattern": {"a": 5}}
    new = adapted(lib, 4, seed=3, **fields)
    new.save_pretrained(tmp_path)
    model = adapted(lib, 4, alpha_pattern={"a": 5})
    hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    torch.testing.assert_close(model(IDS), new(IDS))
    with torch.no_grad():
        for net in (model, new):
            net.base_model.model.a.set_scale("default", 0.5)
    torch.testing.assert_close(model(IDS), new(IDS))


def test_without_recompilation(lib, hotswap, tmp_path):
    """Parameters and scalings stay the objects that compiled code holds."""
    model = prepared(lib, hotswap, 8)
    layers = [model.base_model.model.a, model.base_model.model.grouped]
    held = dict(model.named_parameters())
    where = {key: p.data_ptr() for key, p in held.items()}
    scalings = [layer.scaling["default"] for layer in layers]
    for rank, seed in ((2, 3), (8, 4), (6, 5)):
        new = adapted(lib, rank, seed)
        new.save_pretrained(tmp_path / str(rank))
        hotswap.hotswap_adapter(model, tmp_path / str(rank), "default", torch_device="cpu")
        torch.testing.assert_close(model(IDS), new(IDS))
        assert all(held[key] is p and p.data_ptr() == where[key] for key, p in model.named_parameters())
        assert all(layer.scaling["default"] is scaling for layer, scaling in zip(layers, scalings))


def test_compiled(lib, hotswap, tmp_path):
    new = adapted(lib, 2, 3)
    new.save_pretrained(tmp_path)
    model = torch.compile(prepared(lib, hotswap, 8), backend="eager")
    model(IDS)
    hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(model(IDS), new(IDS))
    with pytest.raises(ValueError, match=r"compil"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=16)


def test_same_tensors_as_peft(lib, ref, tmp_path):
    """After preparing and swapping, every tensor is that of peft."""
    adapted(ref, 2, 3).save_pretrained(tmp_path)
    states = []
    for module in (lib, ref):
        hotswap = importlib.import_module(WHERE[module.__name__])
        model = adapted(module, 4)
        model.load_state_dict(adapted(ref, 4).state_dict())
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        first = copy.deepcopy(model.state_dict())
        hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
        states.append((first, model.state_dict(), model.base_model.model.a.scaling["default"]))
    for ours, theirs in zip(*states):
        torch.testing.assert_close(ours, theirs)


def test_an_embedding(lib, is_ref, hotswap, tmp_path):
    if is_ref:
        pytest.skip("peft looks for the scaling one level too high")
    new = adapted(lib, 4, 3, targets=["words", "a"])
    new.save_pretrained(tmp_path)
    model = adapted(lib, 4, targets=["words", "a"])
    hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    torch.testing.assert_close(model(IDS), new(IDS))


def refused(hotswap, model, path, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=match):
        hotswap.hotswap_adapter(model, path, "default", torch_device="cpu")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_refused(lib, hotswap, tmp_path):
    model = adapted(lib, 4, targets=["a"])
    adapted(lib, 4, 3).save_pretrained(tmp_path / "more")
    refused(hotswap, model, tmp_path / "more", "unexpected keys")
    adapted(lib, 4, 3, targets=["a"], use_dora=True).save_pretrained(tmp_path / "dora")
    refused(hotswap, model, tmp_path / "dora", "use_dora")
    other = lib.get_peft_model(base(), lib.LoHaConfig(target_modules=["a"]))
    other.save_pretrained(tmp_path / "loha")
    refused(hotswap, model, tmp_path / "loha", "LOHA")
    refused(hotswap, other, tmp_path / "loha", "LOHA")
    adapted(lib, 4, 3, targets=["a"]).save_pretrained(tmp_path / "good")
    model.merge_adapter()
    refused(hotswap, model, tmp_path / "good", "merged")


def test_preparing_refused(lib, hotswap):
    with pytest.raises(ValueError, match=r"LoRA|adapter layers"):
        hotswap.prepare_model_for_compiled_hotswap(base(), target_rank=8)
    for rank in (2, 7):  # too small, and no multiple of the groups
        with pytest.raises(ValueError, match="rank"):
            hotswap.prepare_model_for_compiled_hotswap(adapted(lib, 4), target_rank=rank)


# ------------------------------------------------------------------------------------------------- what is there then
CHANGES = {
    "alpha": ({"lora_alpha": 4}, {"lora_alpha": 16}),
    "smaller": ({"r": 4}, {"r": 2}),
    "larger": ({"r": 2}, {"r": 4}),
    "rank_pattern": ({"rank_pattern": {"a": 3}}, {"rank_pattern": {"conv": 2}}),
    "fewer layers": ({}, {"target_modules": ["conv"]}),
    "a pattern of names": ({"target_modules": "a|conv|grouped"}, {}),
    "an embedding": ({"target_modules": ["words", "a"]}, {"target_modules": ["words", "a"], "r": 2}),
    "dora": ({"target_modules": ["a", "conv"], "use_dora": True}, {"target_modules": ["a", "conv"], "use_dora": True}),
}


def moved(lib, seed, **fields):
    torch.manual_seed(seed)
    fields = {"r": 4, "target_modules": ["a", "conv", "grouped"], "init_lora_weights": False, **fields}
    return H.move(lib.get_peft_model(base(), lib.LoraConfig(**fields)).eval(), scale=0.1 * seed)


@pytest.mark.parametrize("change, how", [
    *((change, how) for change in CHANGES for how in ("plain", "prepared")),
    *((change, "compiled") for change in list(CHANGES)[1:5]),
])
def test_is_the_new_adapter_afterwards(change, how, lib, is_ref, tmp_path):
    """What is saved then is what was swapped in, and loads as that."""
    if is_ref:
        pytest.skip("peft keeps the configuration of the adapter before, and saves what it has padded")
    hotswap = importlib.import_module(WHERE[lib.__name__])
    first, second = CHANGES[change]
    new, model = moved(lib, 2, **second), moved(lib, 1, **first)
    tensors, config = H.saved(new, tmp_path / "new")
    inside = model
    if how != "plain":
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        H.saved(model, tmp_path / "prepared")  # without the zeros
        H.identical(H.run(lib.PeftModel.from_pretrained(base(), tmp_path / "prepared"), {"ids": IDS}),
                    H.run(moved(lib, 1, **first), {"ids": IDS}))
    if how == "compiled":
        model = torch.compile(model, backend="eager")
        model(IDS)
    for _ in range(2):  # the second time into what was swapped
        hotswap.hotswap_adapter(model, tmp_path / "new", "default", torch_device="cpu")
        torch.testing.assert_close(model(IDS), new(IDS))
        again, config_again = H.saved(inside, tmp_path / "again")
        H.identical(again, tensors)
        H.same_config(config_again, config)
    inside.load_adapter(tmp_path / "new", "default")
    torch.testing.assert_close(model(IDS), new(IDS))
    other = lib.PeftModel.from_pretrained(base(), tmp_path / "again")
    torch.testing.assert_close(other(IDS), new(IDS))


def test_back_to_all_layers(lib, hotswap, tmp_path):
    """A layer that was left alone for a while takes part again."""
    folders = []
    for seed, targets in ((2, ["conv"]), (3, ["a", "conv", "grouped"])):
        folders.append(moved(lib, seed, target_modules=targets))
        folders[-1].save_pretrained(tmp_path / str(seed))
    model = moved(lib, 1)
    for seed, new in zip((2, 3, 2), (*folders, folders[0])):
        hotswap.hotswap_adapter(model, tmp_path / str(seed), "default", torch_device="cpu")
        torch.testing.assert_close(model(IDS), new(IDS))


@each_case(lambda c: c.config == "LoraConfig" and c.base.name != "targets")
def test_every_layer_and_variant(case, lib, is_ref, tmp_path):
    """The adapter swapped in gives what it gives where it was trained, or is refused."""
    if is_ref:
        pytest.skip("peft swaps linear layers and convolutions only")
    hotswap = importlib.import_module(WHERE[lib.__name__])
    new = H.move(H.adapt(lib, case), case.scale)
    H.saved(new, tmp_path)
    model = H.move(H.adapt(lib, case), -case.scale)
    before = H.snapshot(model)
    config = new.peft_config["default"]
    if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
        with pytest.raises(lib.errors.PeftError):
            hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
        H.identical(H.snapshot(model), before)
        return
    hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    H.identical(H.snapshot(model), H.snapshot(new))
    H.close(H.run(model, H.inputs(case)), H.run(new, H.inputs(case)), 2e-5)


RANKS = ("lora/parameter/3d", "lora/parameter/2d", "lora/attention/plain", "lora/hf_conv1d/plain", "dora/conv2d/plain",
         "lora/conv1d_groups/plain", "lora/embedding/plain", "alora/llama/plain", "qalora/linear/plain",
         "monteclora/linear/plain", "velora/linear/plain")  # fmt: skip


@each_case(lambda c: c.id in RANKS)
def test_other_ranks_everywhere(case, lib, is_ref, tmp_path):
    """Into twice the rank, or refused where zeros cannot fill it."""
    if is_ref:
        pytest.skip("peft swaps linear layers and convolutions only")
    hotswap = importlib.import_module(WHERE[lib.__name__])
    new = H.move(H.adapt(lib, case), case.scale)
    tensors, _ = H.saved(new, tmp_path / "new")
    model = lib.get_peft_model(case.base.build(), H.config(lib, case, r=2 * case.kwargs["r"])).eval()
    before = H.snapshot(model)
    try:
        hotswap.hotswap_adapter(model, tmp_path / "new", "default", torch_device="cpu")
    except lib.errors.PeftError:
        H.identical(H.snapshot(model), before)
        assert case.method == "monteclora"
        return
    H.close(H.run(model, H.inputs(case)), H.run(new, H.inputs(case)), 2e-5)
    H.identical(H.saved(model, tmp_path / "again")[0], tensors)


# ------------------------------------------------------------------------------------------------------ what is refused
def nan(tensors, config):
    tensors[min(tensors)][0, 0] = torch.nan


def infinite(tensors, config):
    tensors[max(tensors)][0, 0] = torch.inf


def without_b(tensors, config):
    del tensors[max(tensors)]


def without_layer(tensors, config):
    for key in [key for key in tensors if ".conv." in key]:
        del tensors[key]


def transposed(tensors, config):
    key = next(key for key in tensors if ".a.lora_A" in key)
    tensors[key] = tensors[key].T.contiguous()


def of_other_width(tensors, config):
    key = next(key for key in tensors if ".a.lora_A" in key)
    tensors[key] = torch.ones(4, 5)


def another(tensors, config):
    tensors["base_model.model.b.lora_A.weight"] = torch.ones(4, 16)


FAULTS = {
    fault.__name__: fault for fault in (nan, infinite, without_b, without_layer, transposed, of_other_width, another)
}
FIELDS = {
    "rank": {"r": 7},
    "rank of one": {"rank_pattern": {"a": 3}},
    "other variant": {"use_dora": True},
    "other pattern": {"alpha_pattern": {"a": 3}},
    "no such layer": {"target_modules": ["nothing"]},
    "one more layer": {"target_modules": ["a", "conv", "grouped", "words"]},
    "trained biases": {"bias": "all"},
}


@pytest.mark.parametrize("fault", [*FAULTS, *FIELDS])
def test_as_strict_as_loading(fault, lib, is_ref, tmp_path):
    """What a load refuses, a swap refuses too, and everything is as it was."""
    if is_ref:
        pytest.skip("peft checks the keys only")
    hotswap = importlib.import_module(WHERE[lib.__name__])
    moved(lib, 2).save_pretrained(tmp_path)
    tensors, config = H.stored(tmp_path)
    FAULTS.get(fault, lambda tensors, config: config.update(FIELDS[fault]))(tensors, config)
    H.safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = moved(lib, 1)
    layers = [m for m in model.modules() if hasattr(m, "scaling")]
    was = model.peft_config["default"]
    before, values = H.snapshot(model), [(dict(m.scaling), dict(m.r), dict(m.lora_alpha)) for m in layers]
    with pytest.raises(lib.errors.PeftError):
        hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    H.identical(H.snapshot(model), before)
    assert [(m.scaling, m.r, m.lora_alpha) for m in layers] == values
    assert model.peft_config["default"] is was
    if fault not in ("other variant", "other pattern"):
        with pytest.raises(lib.errors.PeftError):
            model.load_adapter(tmp_path, "other")


def test_dora_cannot_leave_a_layer(lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft sets the magnitude to 0, and so the whole layer")
    moved(lib, 2, target_modules=["a"], use_dora=True).save_pretrained(tmp_path)
    model = moved(lib, 1, target_modules=["a", "conv"], use_dora=True)
    refused(importlib.import_module(WHERE[lib.__name__]), model, tmp_path, "cannot be set to 0")


def test_padded_factors_are_not_combined(lib, is_ref, hotswap, tmp_path):
    """A smaller rank, swapped in, has zeros behind its factors; what works on deltas does not mind."""
    if is_ref:
        pytest.skip("ends in a RuntimeError in peft")
    for r in (4, 2):
        adapted(lib, r, targets=("a", "conv")).save_pretrained(tmp_path / str(r))
    model = lib.PeftModel.from_pretrained(base(), tmp_path / "4")
    model.load_adapter(tmp_path / "2", "b")
    hotswap.hotswap_adapter(model, tmp_path / "2", "default", torch_device="cpu")
    for kind in ("linear", "cat"):
        with pytest.raises(lib.UnsupportedFeatureError, match="padded with zeros"):
            model.add_weighted_adapter(["default", "b"], [0.5, 0.5], kind, combination_type=kind)
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "svd", combination_type="svd")
