"""merge_and_unload: one layer at a time, in the weights' own memory where it can be, and not before all is known."""

import pytest
import torch
from torch import nn

import minipeft
from minipeft import HiraConfig, LoraConfig, get_peft_model
from minipeft.core.bases import Base
from minipeft.core.errors import MergeError
from minipeft.core.layer import Layer, layers

from .interop import harness as H
from .interop.cases import each_case


def trained(model, **options):
    model = get_peft_model(model, LoraConfig(r=4, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_plain_layers_are_merged_in_place(dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5, bias=False)).to(dtype)
    model = trained(base, target_modules=["0", "1"])
    before = [layer.weight.data_ptr() for layer in base]
    model.merge_adapter()
    merged = [layer.get_base_layer().weight.clone() for layer in base]
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert [layer.weight.data_ptr() for layer in plain] == before
    for layer, weight in zip(plain, merged):
        assert type(layer) is nn.Linear
        computed = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # in this, then rounded once
        torch.testing.assert_close(layer.weight.data, weight, atol=100 * computed, rtol=torch.finfo(dtype).eps)


def test_safe_merge_keeps_the_old_weights_until_all_are_checked():
    base = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5))
    model = trained(base, target_modules=["0", "1"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        base[0].lora_A["default"].weight[0, 0] = float("nan")  # the last to be merged
    with pytest.raises(MergeError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    for key, value in model.state_dict().items():
        if "base_layer" in key:
            assert torch.equal(value, before[key]), key


def test_a_layer_that_refuses_leaves_all_as_they_were():
    base = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 5))
    model = trained(base, target_modules=["0", "2"])
    x = torch.randn(2, 4, 3)
    before, running = {key: value.clone() for key, value in model.state_dict().items()}, model(x)
    with pytest.raises(MergeError, match="groups"):
        model.merge_and_unload()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), running)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_safe_merge_checks_what_is_stored(dtype):
    """What is finite before it is rounded to the dtype of the weight, or of the bias, may be infinite after."""
    over = min(torch.finfo(dtype).max * 1.1, torch.finfo(torch.float32).max)
    for slot in "weight", "bias":
        base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
        model = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, lora_bias=True, target_modules=["0", "1"]))
        layer = base[0]  # the last to be merged
        with torch.no_grad():
            layer.lora_A["default"].weight.fill_(1.0)
            getattr(layer.lora_B["default"], slot).fill_(over)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(MergeError, match="do not fit"):
            model.merge_adapter(safe_merge=True)
        for key, value in model.state_dict().items():
            assert torch.equal(value.view(torch.uint8), before[key].view(torch.uint8)), key
        assert not any(layer.merged for layer in base)


class KeptAtOnce:
    """The most frozen layers of a model whose originals are kept at the same time, looked at whenever one is kept."""

    def __init__(self, model, monkeypatch):
        self.most, back_up = 0, Base.back_up
        bases = [layer.base for layer in layers(model)]

        def counting(base, tensors):
            kept = back_up(base, tensors)
            self.most = max(self.most, sum(other.backup is not None for other in bases))
            return kept

        monkeypatch.setattr(Base, "back_up", counting)


@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
@each_case(lambda case: case.merges and not case.prompt and not case.base.transformers and case.id.endswith("/plain"))
def test_one_layer_at_a_time(case, safe, monkeypatch):
    model = H.move(H.adapt(minipeft, case), case.scale)
    batch = H.inputs(case)
    want = H.run(model.eval(), batch)
    counted = KeptAtOnce(model, monkeypatch)
    plain = model.merge_and_unload(safe_merge=safe)
    assert counted.most <= 1
    if not case.disputed:
        H.close(H.run(plain, batch), want, 1e-4)


def test_quantised_layers_one_at_a_time(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    for make in (bnb.nn.Linear4bit, lambda *sizes: bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)):
        model = trained(nn.Sequential(*[make(64, 64) for _ in range(3)]).to("cpu"), target_modules=["0", "1", "2"])
        counted = KeptAtOnce(model, monkeypatch)
        model.merge_and_unload()
        assert counted.most == 1


def test_a_hook_that_no_matrix_does_refuses_before_anything_is_changed():
    base = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5))
    model = trained(base, target_modules=["0", "1"])
    base[0].lora_A["default"].register_forward_hook(lambda module, args, output: output.square())  # the last one
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MergeError, match="hook"):
        model.merge_and_unload()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_two_adapters_that_read_the_weight():
    torch.manual_seed(0)
    config = HiraConfig(r=2, target_modules=["0", "1"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5)), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 6)
    want = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), want)


def test_the_inner_one_for_good_while_the_outer_one_is_merged():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6)
    inner = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, inner, "inner", mixed=True)
    model.add_adapter("outer", minipeft.LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    model.set_adapter(["inner", "outer"])
    want = model.eval()(x)
    model.base_model.merge_adapter(["outer"])
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["inner"])(x), want)


def test_a_weight_that_cannot_be_written_to_is_found_before_any_is():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[0].weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
    model, before = trained(base, target_modules=["0", "1"]), base[1].weight.clone()
    with pytest.raises(RuntimeError, match="memory location"):
        model.merge_and_unload()
    assert torch.equal(layers(model)[1].base.leaf.weight, before)


def test_an_interrupt_between_two_layers(monkeypatch):
    model, x = trained(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), target_modules=["0", "1"]), torch.randn(3, 6)
    want, merge, done = model(x), Layer.merge_in_place, []

    def interrupted(layer, names, trial=False, safe=False):
        if not trial and done:
            raise KeyboardInterrupt
        merge(layer, names, trial, safe)
        done.append(layer) if not trial else None

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "merge_in_place", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.merge_and_unload()
    assert len(done) == 1
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(model.merge_and_unload()(x), want)
