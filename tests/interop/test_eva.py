"""EVA: peft's matrices, ranks and initialised models, for the same data."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from . import harness as H
from .bases import GPT2, LLAMA, VOCAB
from .processes import SCRIPTS

pytest.importorskip("transformers", reason="transformers is not installed: the base models are its")


def batches(n=6, size=8, length=9, **more):
    g = torch.Generator().manual_seed(5)
    found = []
    for _ in range(n):
        ids = torch.randint(2, VOCAB, (size, length), generator=g)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def config(lib, targets=("q_proj", "k_proj", "down_proj"), eva=(), **fields):
    fields = {"r": 4, "lora_alpha": 6, **fields}
    return lib.LoraConfig(
        init_lora_weights="eva",
        target_modules=list(targets),
        eva_config=lib.EvaConfig(**{"tau": 0.9, **dict(eva)}),
        **fields,
    )


def adapted(lib, base=LLAMA, **fields):
    H.seed(0)
    return lib.get_peft_model(base.build(), config(lib, **fields)).eval()


def same(got, want, tolerance=1e-3):
    assert {k: tuple(t.shape) for k, t in got.items()} == {k: tuple(t.shape) for k, t in want.items()}
    for name, W in want.items():
        torch.testing.assert_close(got[name].float(), W.float(), rtol=0, atol=tolerance)


VARIANTS = [
    {}, {"eva": {"rho": 1.0}}, {"eva": {"rho": 1.5, "tau": 0.95}}, {"eva": {"use_label_mask": False}},
    {"eva": {"label_mask_value": 7}}, {"rank_pattern": {"layers.1.mlp.down_proj": 2}}, {"r": 2},
    {"targets": ("down_proj", "o_proj"), "eva": {"whiten": True}}, {"layers_to_transform": [1]},
]  # fmt: skip
EVEN = [{"eva": {"rho": 1.0}}, {"r": 2}, {"layers_to_transform": [1]}]  # here no layer gets another rank


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_same_matrices(fields, lib, ref):
    want = ref.get_eva_state_dict(adapted(ref, **fields), batches(), show_progress_bar=False)
    got = lib.get_eva_state_dict(adapted(lib, **fields), batches(), show_progress_bar=False)
    same(got, want)
    special = fields.get("rank_pattern", {})
    ranks = [next((r for key, r in special.items() if key in name), fields.get("r", 4)) for name in got]
    assert sum(map(len, got.values())) == sum(ranks) and len(got) > 1
    assert any(len(W) != r for W, r in zip(got.values(), ranks)) or fields in EVEN


def test_without_adapters(lib, ref):
    args = {"dataloader": batches(), "show_progress_bar": False}
    for base, fields in ((LLAMA, {}), (GPT2, {"targets": ("c_attn", "c_proj")})):
        want = ref.get_eva_state_dict(base.build(), peft_config=config(ref, **fields), **args)
        got = lib.get_eva_state_dict(base.build(), peft_config=config(lib, **fields), **args)
        same(got, want)
        model = base.build().train()
        lib.get_eva_state_dict(model, peft_config=config(lib, **fields), **args)
        assert model.training and not any(m._forward_hooks for m in model.modules())


def test_own_functions(lib, ref):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    torch.manual_seed(1)
    data = [torch.randn(20, 3, 12) * torch.linspace(3, 0.1, 12) for _ in range(5)]
    options = {"forward_fn": lambda model, x: model(x), "prepare_model_inputs_fn": None, "show_progress_bar": False}
    every = {
        "one": lambda x, seen, name: x[0][:, 0].contiguous(),
        "two": lambda x, seen, name: x[0][:, :2].flatten(0, 1),
    }
    for prepare in (None, every):
        found = []
        for module in (lib, ref):
            mine = copy.copy(prepare)
            found.append(module.get_eva_state_dict(Net(), data, config(module, ("one", "two"), r=3),
                                                   prepare_layer_inputs_fn=mine, **options))  # fmt: skip
        same(*found)


SCALES = [
    {},
    {"eva": {"adjust_scaling_factors": False}},
    {"use_rslora": True},
    {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 5}},
]


@pytest.mark.parametrize("fields", SCALES, ids=str)
def test_same_initialised_model(fields, lib, ref, tmp_path):
    models = []
    for module in (ref, lib):
        model = adapted(module, **fields)
        before = H.run(model, LLAMA.inputs())
        module.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
        H.close(H.run(model, LLAMA.inputs()), before, 1e-6)  # B = 0
        models.append(model)
    theirs, ours = models
    H.same_names(H.snapshot(ours), H.snapshot(theirs))
    same(H.snapshot(ours), H.snapshot(theirs))
    H.move(theirs), H.copy_values(theirs, ours)
    H.close(H.run(ours, LLAMA.inputs()), H.run(theirs, LLAMA.inputs()), 2e-5)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad}  # fmt: skip
    ours.save_pretrained(tmp_path)
    for module in (lib, ref):
        again = module.PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
        H.close(H.run(again, LLAMA.inputs()), H.run(ours, LLAMA.inputs()), 2e-5)
    ranks = {k: len(t) for k, t in H.stored(tmp_path)[0].items() if "lora_A" in k}
    assert len(set(ranks.values())) > 1 and json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]


def test_layers_lose_the_adapter_or_start_as_usual(lib, ref):
    models = []
    for module in (ref, lib):
        model = adapted(module)
        state = module.get_eva_state_dict(model, batches(), show_progress_bar=False)
        names = sorted(state)
        state[names[0]] = state[names[0]][:0]
        del state[names[1]]
        with pytest.warns(UserWarning, match="eva"):
            module.initialize_lora_eva_weights(model, eva_state_dict=dict(state))
        models.append(model)
    theirs, ours = models
    assert {k: tuple(t.shape) for k, t in H.snapshot(ours).items()} == {
        k: tuple(t.shape) for k, t in H.snapshot(theirs).items()}  # fmt: skip
    A, B = (ours.get_submodule(f"{names[1]}.lora_{x}.default").weight for x in "AB")
    assert A.any() and not B.any()
    assert isinstance(ours.get_submodule(names[0]), nn.Linear)
    assert names[0].removeprefix("base_model.model.") not in ours.targeted_module_names
    ours.merge_and_unload()


def test_low_memory(lib):
    state = lib.get_eva_state_dict(LLAMA.build(), batches(), config(lib), show_progress_bar=False)
    model = lib.get_peft_model(LLAMA.build(), config(lib), low_cpu_mem_usage=True)
    name = next(iter(state))
    del state[name]
    with pytest.warns(UserWarning, match="eva"):
        lib.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert not any(p.is_meta for p in model.parameters())
    H.run(model, LLAMA.inputs())


def test_two_processes(is_ref, tmp_path):
    if is_ref:
        pytest.skip("the script is about minipeft")
    command = [sys.executable, SCRIPTS / "eva_in_two.py"]
    both = [subprocess.Popen([*command, str(rank), tmp_path / "store"], stdout=subprocess.PIPE) for rank in (0, 1)]
    assert [process.communicate(timeout=120)[0].split() for process in both] == [[b"same"]] * 2


def test_refusals(lib, is_ref):
    if is_ref:
        pytest.skip("errors of the module under test")
    model = adapted(lib)
    before = H.snapshot(model)
    state = lib.get_eva_state_dict(model, batches(), show_progress_bar=False)
    name = next(iter(state))
    for wrong, match in (
        ({**state, name: state[name][:, 1:]}, "does not fit"),
        ({**state, "nowhere": state[name]}, "nowhere"),
        (None, "required"),
    ):
        with pytest.raises(ValueError, match=match):
            lib.initialize_lora_eva_weights(model, eva_state_dict=wrong)
    for data, match in (([], "empty"), (batches(size=1, length=3), "larger batches")):
        with pytest.raises(ValueError, match=match):
            lib.get_eva_state_dict(model, data, show_progress_bar=False)
    with pytest.raises(ValueError, match="elsewhere"):
        lib.get_eva_state_dict(model, batches(), prepare_layer_inputs_fn={"elsewhere": None}, show_progress_bar=False)
    with pytest.raises(ValueError, match="peft_config"):
        lib.get_eva_state_dict(LLAMA.build(), batches())
    with pytest.raises(ValueError, match="PeftModel"):
        lib.initialize_lora_eva_weights(LLAMA.build(), batches())
    with pytest.raises(ValueError, match="init_lora_weights"):
        lib.initialize_lora_eva_weights(
            lib.get_peft_model(LLAMA.build(), lib.LoraConfig(target_modules=["q_proj"])), batches()
        )
    H.identical(H.snapshot(model), before)
    assert not any(m._forward_hooks for m in model.modules())
