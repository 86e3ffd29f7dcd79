"""PEFT's functions for injected adapters, and its helpers."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x, scale: float = 1.0):
        """Of the net."""
        return self.head(self.b(torch.tanh(self.a(x)))) * scale

    def generate(self, x, length: int = 3):
        return x


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def config(lib, **fields):
    return lib.LoraConfig(**{"r": 2, "target_modules": ["a", "b"], "init_lora_weights": False, **fields})


@pytest.fixture
def part(lib):
    """The submodule of a name, of the implementation under test."""
    return lambda name: importlib.import_module(f"{lib.__name__}.{name}")


@pytest.fixture
def x():
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def injected(lib, functional, dtype=torch.float32):
    """A model with the adapters "one" and "two", "one" active."""
    model = base(dtype)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        functional.inject_adapter_in_model(config(lib, modules_to_save=["head"]), model, name)
    functional.set_adapter(model, "one")
    return model


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_functional(lib, ref, x):
    """The same outputs and trained parameters in peft, after each step."""
    states = []
    for module in (lib, ref):
        functional = importlib.import_module(f"{module.__name__}.functional")
        model, seen = injected(module, functional), []

        def note(label, model=model, seen=seen):
            seen.append((label, trained(model), model(x).detach(), sorted(model.state_dict())))

        note("one")
        functional.set_adapter(model, "two")
        note("two")
        functional.set_adapter(model, "two", inference_mode=True)
        note("two, frozen")
        functional.set_requires_grad(model, ["one", "two"])
        note("both trained")
        functional.set_requires_grad(model, "two", False)
        note("one trained")
        functional.set_adapter(model, "two")
        seen.append(functional.delete_adapter(model, "two", prefix="lora_"))
        note("two deleted")
        states.append(seen)
    for ours, theirs in zip(*states, strict=True):
        if isinstance(theirs, tuple):
            assert ours[:2] == theirs[:2] and ours[3] == theirs[3]
            torch.testing.assert_close(ours[2], theirs[2])
        else:
            assert list(ours) == list(theirs) == ["one"]


def test_delete_refuses_merged(lib, part, is_ref):
    if is_ref:
        pytest.skip("peft deletes it and leaves it in the weights")
    functional = part("functional")
    model = injected(lib, functional)
    model.b.merge()
    with pytest.raises(ValueError, match="merged"):
        functional.delete_adapter(model, "one", prefix="lora_")
    assert "one" in model.a.lora_A and "one" in model.b.lora_A


def test_cast_adapter_dtype(lib, part):
    functional = part("functional")
    model = injected(lib, functional, torch.bfloat16)
    functional.cast_adapter_dtype(model, "one", autocast_adapter_dtype=False)
    dtypes = lambda name: {p.dtype for key, p in model.named_parameters() if f".{name}." in key and "lora" in key}
    assert dtypes("one") == dtypes("two") == {torch.bfloat16}
    functional.cast_adapter_dtype(model, "one")
    assert dtypes("one") == {torch.float32} and dtypes("two") == {torch.bfloat16}


def test_rescale_adapter_scale(lib, ref, x):
    outputs = []
    for module in (lib, ref):
        torch.manual_seed(2)
        model = module.get_peft_model(base(), config(module))
        helpers = importlib.import_module(f"{module.__name__}.helpers")
        before = model(x)
        with helpers.rescale_adapter_scale(model, 0.3):
            outputs.append(model(x))
            assert not torch.equal(outputs[-1], before)
        assert torch.equal(model(x), before)
        with pytest.raises(ZeroDivisionError), helpers.rescale_adapter_scale(model, 0.3):
            1 / 0  # noqa: B018
        assert torch.equal(model(x), before)
        with pytest.raises(ValueError), helpers.rescale_adapter_scale(base(), 0.3):
            pass
        with pytest.raises(TypeError), helpers.rescale_adapter_scale(model, "a"):
            pass
    torch.testing.assert_close(*outputs)


def test_disable_input_dtype_casting(lib, part, x):
    """Without the cast a bfloat16 input meets float32 factors."""
    helpers, model = part("helpers"), lib.get_peft_model(base(torch.bfloat16), config(lib))
    x = x.bfloat16()
    y = model(x)
    with helpers.disable_input_dtype_casting(model, active=False):
        assert torch.equal(model(x), y)
    with helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)
    assert torch.equal(model(x), y)


def test_check_if_peft_model(lib, part, tmp_path):
    lib.get_peft_model(base(), config(lib)).save_pretrained(tmp_path / "adapter")
    check = part("helpers").check_if_peft_model
    assert check(str(tmp_path / "adapter")) and not check(str(tmp_path)) and not check(str(tmp_path / "none"))


@pytest.mark.parametrize("method", ["forward", "generate", "all"])
def test_update_signature(method, lib, part, is_ref, x):
    if is_ref:
        pytest.skip("peft changes the signature of the class, for all models")
    model = lib.get_peft_model(base(), config(lib))
    y = model(x, scale=2.0)
    part("helpers").update_signature(model, method)
    for name in ("forward", "generate"):
        assert ("x" in inspect.signature(getattr(model, name)).parameters) == (method in (name, "all"))
    assert (model.forward.__doc__ == "Of the net.") == (method != "generate")
    assert torch.equal(model.forward(x, scale=2.0), y) and model.generate(x) is x
    with pytest.raises(ValueError, match="not supported"):
        part("helpers").update_signature(model, "other")


def test_update_signature_leaves_precise_ones(lib, part):
    """That of a task class says what it takes already."""
    model = base()
    model.config = SimpleNamespace(model_type="custom", to_dict=lambda: {"model_type": "custom"})
    model.prepare_inputs_for_generation = lambda *args, **kwargs: kwargs
    model = lib.get_peft_model(model, config(lib, task_type="CAUSAL_LM"))
    before = inspect.signature(model.forward)
    part("helpers").update_signature(model)
    assert inspect.signature(model.forward) == before
