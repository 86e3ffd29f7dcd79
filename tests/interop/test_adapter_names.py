"""An adapter may be named like a module, a slot or a tensor of the model: nothing is confused, for every method."""

import warnings

import pytest

from . import harness as H
from .cases import CASES

METHODS = {}
for _case in CASES:
    if not _case.prompt and "modules_to_save" not in _case.kwargs:
        METHODS.setdefault(_case.config, _case)
NAMES = ["default", "lora_A", "base_layer", "*"]
PLAIN = "something"


def build(lib, case, name, second):
    H.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(case.base.build(), H.config(lib, case), name)
        if case.second is not None:
            model.add_adapter(second, H.config(lib, case, **case.second))
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)
def test_nothing_is_confused(case, name, lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft looks for the name in keys")
    batch = H.inputs(case)
    if name == "*":  # that of a module of the model
        name = next(n for n, _ in case.base.build().named_children())
    plain, model = build(lib, case, PLAIN, "further"), build(lib, case, name, "further")
    H.move(plain)
    state = plain.state_dict()
    mine = model.state_dict()
    for tensor, like in zip(mine.values(), state.values(), strict=True):
        tensor.copy_(like)
    want = H.run(plain, batch)
    H.identical(H.run(model, batch), want)
    for one in (plain, model):
        one.save_pretrained(str(tmp_path / "saved"))
    H.identical(H.stored(tmp_path / "saved" / name if name != "default" else tmp_path / "saved")[0],
                H.stored(tmp_path / "saved" / PLAIN)[0])
    folder = tmp_path / "saved" / PLAIN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        H.identical(H.run(lib.PeftModel.from_pretrained(case.base.build(), folder, name), batch), want)
        if case.second is not None:
            model.load_adapter(folder, name)
            model.set_adapter("further")
            model.load_adapter(folder, "again") if case.second == {} else None
            further = H.run(model, batch)
            plain.set_adapter("further")
            H.identical(further, H.run(plain, batch))
            model.set_adapter(name)
            H.identical(H.run(model, batch), want)
            with model.disable_adapter():
                H.run(model, batch)
            model.delete_adapter(name)
            plain.delete_adapter(PLAIN)
            model.set_adapter("further")
            H.identical(H.run(model, batch), further)
            assert [key for key in model.state_dict() if "again" not in key] == list(plain.state_dict())


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "\ud800", "a/b", "a\\b", "a.b", ".", "..", "", "\0", "x\0"],
                         ids=ascii)
def test_no_folder_can_have_that_name(name, lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft fails when it is saved")
    case = METHODS["LoraConfig"]
    model = case.base.build()
    before = H.snapshot(model)
    with pytest.raises(lib.PeftError, match="adapter name"):
        lib.get_peft_model(model, H.config(lib, case), name)
    H.identical(H.snapshot(model), before)
    adapted = H.adapt(lib, case)
    H.saved(adapted, tmp_path)
    for add in (lambda: adapted.add_adapter(name, H.config(lib, case)), lambda: adapted.load_adapter(tmp_path, name)):
        with pytest.raises(lib.PeftError, match="adapter name"):
            add()


@pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)
def test_no_attribute_of_what_holds_adapters_is_a_name(case, lib, is_ref):
    if is_ref:
        pytest.skip("peft raises a KeyError of torch's")
    held = {}
    for module in lib.get_peft_model(case.base.build(), H.config(lib, case)).modules():
        if "default" in {*module._modules, *module._parameters, *module._buffers}:
            held.setdefault(type(module), module)
    assert held or case.method == "adaption_prompt", "where the names of adapters are keys"
    for name in sorted({name for module in held.values() for name in {*vars(module), "keys", "forward"}}):
        with pytest.raises(lib.PeftError, match="adapter name"):
            lib.get_peft_model(case.base.build(), H.config(lib, case), name)


def test_the_longest_name(lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft is not asked")
    case = METHODS["LoraConfig"]
    name = "é" * 127 + "x"
    model = lib.get_peft_model(case.base.build(), H.config(lib, case), name)
    model.save_pretrained(str(tmp_path))
    lib.PeftModel.from_pretrained(case.base.build(), tmp_path / name, name)


def test_a_warning_says_so(lib, is_ref):
    if is_ref:
        pytest.skip("peft's warning is its own")
    case = METHODS["LoraConfig"]
    name = next(n for n, _ in case.base.build().named_children())
    with pytest.warns(lib.PeftWarning, match=f"named '{name}' like the adapter"):
        lib.get_peft_model(case.base.build(), H.config(lib, case), name)
