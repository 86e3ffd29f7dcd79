"""AdaLoRA: a checkpoint holds what pruning has left, and goes into an adapter that is larger, or smaller."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

STEPS = 8


def fresh(lib, seed=1, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    fields = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": STEPS, **fields}
    torch.manual_seed(seed)
    return lib.get_peft_model(model, lib.AdaLoraConfig(target_modules=["0", "2"], **fields))


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(20, 6, generator=generator), torch.randn(20, 4, generator=generator)


def train(model, steps=range(STEPS), after=lambda step: None):
    """Train; `after(step)` is called after every step."""
    x, y = data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        after(step)
    return model


def shapes(model):
    return {key: tuple(p.shape) for key, p in model.named_parameters() if "lora_" in key}


def test_into_the_trained_adapter(lib, ref, tmp_path):
    """As a trainer does when it goes back to the best checkpoint: the live adapter is unpruned."""
    found = {}
    for side in (lib, ref):
        model = train(fresh(side))
        whole, y, folder = shapes(model), model(data()[0]).detach(), tmp_path / side.__name__
        model.save_pretrained(folder)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.requires_grad)
        model.load_adapter(folder, "default", is_trainable=True)
        torch.testing.assert_close(model(data()[0]), y)
        assert shapes(model) != whole
        model.save_pretrained(folder / "again")
        found[side] = shapes(model), model.peft_config["default"].rank_pattern, y
        other = ref if side is lib else lib
        again = other.PeftModel.from_pretrained(fresh(side).unload(), folder / "again")
        torch.testing.assert_close(again(data()[0]), y)
    assert found[lib][:2] == found[ref][:2]
    torch.testing.assert_close(found[lib][2], found[ref][2])


def test_into_fresh_and_smaller_adapters(lib, is_ref, tmp_path):
    """Checkpoints of different steps, in any order, into one adapter, which can be trained and saved afterwards."""
    if is_ref:
        pytest.skip("peft takes the sizes of the live adapter's rank_pattern, not those of the checkpoint")
    model, y = fresh(lib), {}

    def keep(step):
        model.save_pretrained(tmp_path / str(step))
        y[step] = model(data()[0]).detach()

    train(model, after=keep)
    live, sizes = fresh(lib, seed=2), set()
    parameters = dict(live.named_parameters())
    for step in (5, 2, 7, 0, 4):
        live.load_adapter(tmp_path / str(step), "default", is_trainable=True)
        torch.testing.assert_close(live(data()[0]), y[step])
        assert all(parameters[key] is p and p.grad is None for key, p in live.named_parameters())
        sizes.add(str(shapes(live)))
    assert len(sizes) > 2
    live.load_adapter(tmp_path / "3", "default", is_trainable=True)
    train(live, range(3, STEPS))
    live.save_pretrained(tmp_path / "end")
    left = sum(
        len(t) for key, t in load_file(tmp_path / "end" / "adapter_model.safetensors").items() if "lora_E" in key
    )
    assert left == 4, "the budget in the end: target_r times two layers"
    again = lib.PeftModel.from_pretrained(fresh(lib).unload(), tmp_path / "end")
    torch.testing.assert_close(again(data()[0]), live(data()[0]))


def test_a_checkpoint_that_does_not_fit(lib, is_ref):
    """Nothing has changed, also where the ranks of some layers could have been taken."""
    if is_ref:
        pytest.skip("peft loads without checks")
    model = train(fresh(lib))
    weights = lib.get_peft_model_state_dict(model)
    live = fresh(lib, seed=2)
    before, config = copy.deepcopy(live.state_dict()), live.peft_config["default"].to_dict()
    broken = {key: t[:, :-1] if key.endswith("2.lora_A") else t for key, t in weights.items()}
    with pytest.raises(ValueError, match="another shape"):
        lib.set_peft_model_state_dict(live, broken)
    after = live.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert live.peft_config["default"].to_dict() == config
    larger = lib.get_peft_model_state_dict(fresh(lib, init_r=9))
    with pytest.raises(ValueError, match="another shape"):
        lib.set_peft_model_state_dict(live, larger)
