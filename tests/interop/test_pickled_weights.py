"""Adapters saved as `adapter_model.bin`: read wherever safetensors are, as tensors alone, with a warning."""

import pickle
import warnings
from collections import OrderedDict

import pytest
import torch

from . import bases
from . import harness as H
from .cases import CASES, each_case
from .cases.case import Case

ONE_OF_EACH = [next(c for c in CASES if c.method == m) for m in dict.fromkeys(c.method for c in CASES)]
LORA = next(c for c in CASES if c.id == "lora/linear/plain")
BIN, SAFE = "adapter_model.bin", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _not_for_peft(is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test alone")


def pickled(ref, case, path):
    model = H.move(H.adapt(ref, case)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path, safe_serialization=False)
    assert (path / BIN).is_file() and not (path / SAFE).exists()
    return model


@each_case(lambda c: c in ONE_OF_EACH)
def test_pickles_of_peft_are_read(ref, lib, case: Case, tmp_path):
    theirs = pickled(ref, case, tmp_path)
    with pytest.warns(lib.PeftWarning, match="pickle"):
        ours = lib.PeftModel.from_pretrained(case.base.build(), tmp_path)
    got, want = lib.get_peft_model_state_dict(ours), torch.load(tmp_path / BIN, weights_only=True)
    H.identical(got, want)
    H.close(H.run(ours, H.inputs(case)), H.run(theirs, H.inputs(case)), H.tolerance(case, torch.float32))


@pytest.mark.parametrize("options", [{}, {"subfolder": "inside"}], ids=["folder", "subfolder"])
def test_every_way_in(ref, lib, tmp_path, options):
    theirs = pickled(ref, LORA, tmp_path / options.get("subfolder", ""))
    want = theirs(**H.inputs(LORA))
    with pytest.warns(lib.PeftWarning, match="pickle"):
        tensors = lib.load_peft_weights(tmp_path, device="cpu", **options)
    assert tensors.keys() == ref.get_peft_model_state_dict(theirs).keys()
    for way in ("new", "again"):
        model = H.adapt(lib, LORA, at=1)
        with pytest.warns(lib.PeftWarning, match="pickle"):
            model.load_adapter(tmp_path, "default" if way == "again" else "other", **options)
        model.set_adapter("default" if way == "again" else "other")
        torch.testing.assert_close(model.eval()(**H.inputs(LORA)), want)


def test_by_its_base_model(ref, lib, tmp_path):
    bases.LLAMA.build().save_pretrained(tmp_path / "base")
    base = type(bases.LLAMA.build()).from_pretrained(tmp_path / "base")
    model = ref.get_peft_model(base, ref.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    H.move(model).save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.warns(lib.PeftWarning, match="pickle"):
        again = lib.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    H.identical(lib.get_peft_model_state_dict(again), torch.load(tmp_path / "adapter" / BIN, weights_only=True))


def test_safetensors_come_first(ref, lib, tmp_path):
    pickled(ref, LORA, tmp_path)
    model = H.move(H.adapt(lib, LORA, at=3))
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "safe" / SAFE).rename(tmp_path / SAFE)  # beside the pickle, which saving there would have removed
    assert (tmp_path / BIN).is_file() and (tmp_path / SAFE).is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = lib.load_peft_weights(tmp_path, device="cpu")
    H.identical(both, H.read(tmp_path / SAFE))
    with pytest.warns(lib.PeftWarning, match="pickle"):
        assert not torch.equal(next(iter(lib.load_peft_weights(tmp_path, "cpu", use_safetensors=False).values())),
                               next(iter(both.values())))  # fmt: skip
    (tmp_path / SAFE).unlink()
    with pytest.raises(lib.PeftError, match=SAFE):
        lib.PeftModel.from_pretrained(LORA.base.build(), tmp_path, use_safetensors=True)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    "content",
    [Evil(), {"a": Evil()}, [torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, {"a": {"b": torch.ones(1)}}, None],
    ids=lambda content: type(content).__name__,
)
def test_a_pickle_of_something_else_is_refused(ref, lib, tmp_path, content, capsys):
    pickled(ref, LORA, tmp_path)
    torch.save(content, tmp_path / BIN)
    with warnings.catch_warnings(), pytest.raises(lib.PeftError):
        warnings.simplefilter("ignore")
        lib.PeftModel.from_pretrained(LORA.base.build(), tmp_path)
    (tmp_path / BIN).write_bytes(pickle.dumps(content))
    with warnings.catch_warnings(), pytest.raises(lib.PeftError):
        warnings.simplefilter("ignore")
        lib.PeftModel.from_pretrained(LORA.base.build(), tmp_path)
    assert "run" not in capsys.readouterr().out


def test_an_ordered_dict_is_read(ref, lib, tmp_path):
    pickled(ref, LORA, tmp_path)
    torch.save(OrderedDict(torch.load(tmp_path / BIN, weights_only=True)), tmp_path / BIN)
    with pytest.warns(lib.PeftWarning, match="pickle"):
        lib.PeftModel.from_pretrained(LORA.base.build(), tmp_path)


def test_a_torch_that_cannot_read_it_safely(ref, lib, tmp_path, monkeypatch):
    pickled(ref, LORA, tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(lib.PeftError, match=r"2\.6"):
        lib.PeftModel.from_pretrained(LORA.base.build(), tmp_path)
