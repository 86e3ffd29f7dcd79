"""None in a field of a configuration (null in a saved file): taken wherever peft takes it, with equal results."""

import copy
import dataclasses
import json

import pytest

from minipeft.core.config import _fits, _types

from . import harness as H
from .cases import CASES

OTHERWISE = {  # peft takes these as well, and then
    ("AdaLoraConfig", "deltaT"),  # fails at the first step of its schedule
    ("ShadowConfig", "shadow_dropout"),  # drops nothing, unlike with its default
    ("TinyLoraConfig", "init_weights"),  # starts with what was in memory
    ("UniLoraConfig", "proj_seed"),  # draws a checkpoint that no other process can read
}
ROWS = {}
for _case in CASES:
    if _case.config not in ROWS or ("mlp" in _case.base.name and "mlp" not in ROWS[_case.config].base.name):
        ROWS[_case.config] = _case


def outputs(module, case, field):
    """The case's moved model in train mode, with None in a field."""
    config = getattr(module, case.config)(**{**copy.deepcopy(case.kwargs), field: None})
    H.seed(0)
    model = H.move(module.get_peft_model(case.base.build(), config)).train()
    H.seed(1)
    return H.tensors(H.call(model, H.inputs(case)))


@pytest.mark.parametrize("name", ROWS)
def test_as_in_peft(name, lib, ref, is_ref):
    if is_ref:
        pytest.skip("peft is what it is compared with")
    case, own = ROWS[name], getattr(lib, name)
    theirs = {field.name for field in dataclasses.fields(getattr(ref, name))}
    fields = [field for field, kind in _types(own).items() if field in theirs and not _fits(None, kind)]
    assert "inference_mode" in fields
    for field in fields:
        if (name, field) in OTHERWISE:
            continue
        try:
            want = outputs(ref, case, field)
        except Exception:  # of any kind: there it is no value
            try:
                outputs(lib, case, field)
            except lib.PeftError as error:
                assert field in str(error)
        else:
            H.close(outputs(lib, case, field), want, 2e-5)


@pytest.mark.parametrize("name", ["LoraConfig", "LoHaConfig", "OFTConfig", "VeraConfig", "IA3Config"])
def test_null_in_a_file(name, lib, tmp_path):
    case = ROWS[name]
    model = H.move(H.adapt(lib, case))
    H.saved(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    nulls = {field for field, value in fields.items() if value is False or field in ("loftq_config", "eps")}
    path.write_text(json.dumps({field: None if field in nulls else value for field, value in fields.items()}))
    loaded = lib.PeftModel.from_pretrained(case.base.build(), str(tmp_path))
    H.identical(H.run(loaded, H.inputs(case)), H.run(model, H.inputs(case)))


def test_still_refused(lib, is_ref):
    if is_ref:
        pytest.skip("peft fails later")
    for field in ("r", "lora_alpha", "bias"):
        with pytest.raises(lib.PeftError, match=field):
            lib.LoraConfig(**{field: None})
