"""Adapters as LoRA: peft's factors wherever peft converts, and the law for all others: a full rank changes nothing."""

import copy
import json

import pytest
import torch
from torch import nn

from . import harness as H
from .cases import CASES, each_case

LINEAR = ("mlp", "mlp2d", "hf_conv1d", "llama", "gpt2")
convertible = each_case(
    lambda c: c.base.name in LINEAR and c.merges and not c.prompt and c.kwargs.get("bias", "none") == "none"
)
NOT_EQUAL = {  # why peft's conversion gives something else
    "bdlora": "takes the blocks for the whole matrix, and fails",
    "dora": "leaves the magnitude out",
    "lora": "a LoRA that took its start out of the base weights is converted without them",
    "qalora": "on plain layers a LoRA, see there",
    "miss": "ignores the rank",
    "c3a": "the singular values come in pairs, of which a truncation takes either",
}
REFUSALS = (ValueError, TypeError, NotImplementedError)


def products(tensors):
    """B A of each layer."""
    heads = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {head: tensors[f"{head}.lora_B.weight"] @ tensors[f"{head}.lora_A.weight"] for head in heads}


def convert(module, model, rank):
    try:
        return module.convert_to_lora(model, rank=rank)
    except REFUSALS as error:
        assert str(error)
        return None


@pytest.mark.parametrize("rank", [3, 0.9, 1e-6])
@convertible
def test_what_peft_converts(case, rank, lib, ref):
    if case.method in NOT_EQUAL:
        pytest.skip(NOT_EQUAL[case.method])
    theirs, ours = H.pair(ref, lib, case)
    want = convert(ref, theirs, rank)
    if want is None:
        pytest.skip("peft does not convert it")
    got = lib.convert_to_lora(ours, rank=rank)
    H.same_names(got[1], want[1])
    H.close(products(got[1]), products(want[1]), 1e-4)
    assert {k: t.shape for k, t in got[1].items()} == {k: t.shape for k, t in want[1].items()}


def converts_without_loss(lib, case, model):
    """Full rank, put into the base model: the output of the adapter. False if it refuses."""
    batch = H.inputs(case, torch.float32)
    running = H.weighable(case, H.run(model, batch))
    try:
        config, tensors = lib.convert_to_lora(model, rank=1.0)
    except REFUSALS as error:
        assert str(error)
        return False
    again = lib.get_peft_model(case.base.build(), config).eval()
    report = lib.set_peft_model_state_dict(again, tensors)
    assert not report.unexpected_keys
    H.close(H.weighable(case, H.run(again, batch)), running, 5e-4)
    return True


@convertible
def test_nothing_is_lost_at_full_rank(case, lib, is_ref):
    if is_ref:
        pytest.skip("peft is compared with")
    model = H.move(H.adapt(lib, case), case.scale)
    start = str(case.kwargs.get("init_lora_weights"))
    refuses = start.startswith(("pissa", "olora")) or any(case.kwargs.get(field) for field in BEYOND)
    assert converts_without_loss(lib, case, model) or refuses or case.method not in ADDITIVE, "refused"


BEYOND = ("lora_bias", "trainable_token_indices", "target_parameters")  # what no LoRA on linear layers can say
ADDITIVE = set("lora bdlora qalora dora adalora loha lokr hira vera fourierft c3a gralora vblora unilora".split())


def test_methods_are_covered():
    assert {c.method for c in CASES} >= ADDITIVE


@pytest.mark.parametrize("rank", [2, 0.7])
def test_saved_and_loaded_by_peft(rank, lib, ref, tmp_path):
    class Net(nn.Module):
        """`lin` is the end of `inner.lin`, which is not adapted."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.wide, self.head = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 2)
            self.inner = nn.ModuleDict({"lin": nn.Linear(6, 6)})

        def forward(self, x):
            return self.head(self.wide(self.inner["lin"](torch.tanh(self.lin(x)))))

    config = lib.LoHaConfig(target_modules="lin|wide", modules_to_save=["head"], r=2)
    model = H.move(lib.get_peft_model(Net(), config)).eval()
    for name in ("lin", "wide"):  # a rank that the SVD need not cut
        model.base_model.model.get_submodule(name).hada_w1_a["default"].data[:, 1:] = 0
        model.base_model.model.get_submodule(name).hada_w2_a["default"].data[:, 1:] = 0
    if isinstance(rank, float):
        model.base_model.model.wide.hada_w1_a["default"].data[:, 1:] = 1
    lib.save_as_lora(tmp_path, model, rank=rank)
    x = torch.randn(5, 6)
    for module in (lib, ref):
        again = module.PeftModel.from_pretrained(Net(), tmp_path).eval()
        if isinstance(rank, int):
            torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
        layers = {n for n, m in again.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert layers == {"lin", "wide"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]


def test_injected_adapters(lib, ref):
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model = H.move(lib.inject_adapter_in_model(lib.LoHaConfig(target_modules=["0"]), copy.deepcopy(net)))
    config, tensors = lib.convert_to_lora(model, rank=4)
    assert sorted(tensors) == ["0.lora_A.weight", "0.lora_B.weight"] and config.lora_alpha == config.r == 4
    again = ref.inject_adapter_in_model(ref.LoraConfig(r=4, lora_alpha=4, target_modules=config.target_modules), net)
    ref.set_peft_model_state_dict(again, tensors)
    x = torch.randn(5, 6)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_several_adapters(lib):
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model = lib.get_peft_model(net, lib.LoHaConfig(target_modules=["0"]))
    model.add_adapter("other", lib.LoHaConfig(target_modules=["1"]))
    H.move(model, only=lambda name, p: "hada" in name)
    config, tensors = lib.convert_to_lora(model, rank=2, adapter_name="other")
    assert config.target_modules == {"1"} and sorted(tensors)[0] == "base_model.model.1.lora_A.weight"


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, 5])
def test_ranks_that_cannot_be(rank, lib):
    model = lib.get_peft_model(nn.Sequential(nn.Linear(6, 4)), lib.LoHaConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="rank"):
        lib.convert_to_lora(model, rank=rank)


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda lib: nn.Linear(2, 2), TypeError),
        (lambda lib: lib.get_peft_model(nn.Sequential(nn.Linear(6, 4)), lib.IA3Config(
            target_modules=["0"], feedforward_modules=[])), TypeError),
        (lambda lib: lib.get_peft_model(nn.Sequential(nn.Embedding(6, 4)), lib.LoraConfig(
            target_modules=["0"])), TypeError),
        (lambda lib: lib.get_peft_model(nn.Sequential(nn.Linear(6, 4)), lib.PolyConfig(
            target_modules=["0"])), TypeError),
        (lambda lib: lib.get_peft_model(nn.Sequential(nn.Linear(6, 4)), lib.LoraConfig(
            target_modules=["0"], bias="all")), ValueError),
        (lambda lib: lib.get_peft_model(nn.Sequential(nn.Linear(6, 4)), lib.LoraConfig(
            target_modules=["0"], init_lora_weights="pissa")), ValueError),
    ],
)  # fmt: skip
def test_what_no_lora_can_say(make, error, lib, is_ref):
    if is_ref:
        pytest.skip("peft converts the last ones, into something else")
    with pytest.raises(error):
        lib.convert_to_lora(H.move(make(lib)), rank=2)
