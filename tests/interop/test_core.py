"""minipeft.core as a library: what it makes of a plain module is what PeftModel makes of it, and what peft reads."""

import inspect
import json
import re

import pytest
import torch

import minipeft
from minipeft.core import api
from minipeft.core.plan import WHOLE_MODEL

from . import harness as H
from .cases import CASES
from .processes import ROOT, run

WHOLE = {"XLoraConfig", "AdaptionPromptConfig", "ShadowConfig"}  # they adapt a model as a whole
of_layers = [c for c in CASES if not c.prompt and c.config not in WHOLE and not any(map(c.kwargs.get, WHOLE_MODEL))]
FIRST = {case.method: case for case in reversed(of_layers) if "target_modules" in case.kwargs}
each_method = pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)


def both(case):
    """The case on a PeftModel and by the core, with the same values."""
    theirs = H.move(H.adapt(minipeft, case, dtype=torch.float64), case.scale)
    H.seed(0)
    ours = api.inject_adapter_in_model(H.config(minipeft, case), case.base.build(torch.float64)).eval()
    weights = minipeft.get_peft_model_state_dict(theirs)
    api.set_peft_model_state_dict(ours, weights)
    saved = api.get_peft_model_state_dict(ours)
    assert {key.removeprefix("base_model.model.") for key in weights} == {*saved}
    return theirs, ours


def output(model, case, names=None):
    batch = H.inputs(case, torch.float64)
    inputs = {key: batch.pop(key) for key in case.inputs}
    with torch.no_grad(), api.mixed_batch(model, names, **inputs):
        return {key: value.clone() for key, value in H.tensors(model(**batch)).items()}


@each_method
def test_it_does_what_a_peft_model_does(case, tmp_path):
    theirs, ours = both(case)
    batch = H.inputs(case, torch.float64)
    want = H.run(theirs, batch)
    with theirs.disable_adapter():
        start = H.run(theirs, batch)
    assert H.differ(want, start, 1e-6)
    H.close(output(ours, case), want, 1e-12)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained <= {n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad}

    api.save_adapter(ours, tmp_path)
    again = minipeft.PeftModel.from_pretrained(case.base.build(torch.float64), tmp_path).eval()
    H.close(H.run(again, batch), want, 1e-12)

    with api.disable_adapter(ours):
        H.close(output(ours, case), start, 1e-6)
    if case.merges:
        before = H.snapshot(ours)
        api.merge(ours)
        tolerance = max(1e-8, H.tolerance(case, torch.float64))
        H.close(H.weighable(case, output(ours, case)), H.weighable(case, want), tolerance)
        api.unmerge(ours)
        H.identical(H.snapshot(ours), before)
    bare = api.unload(ours)
    H.close(output(bare, case), start, 1e-6)
    api.load_adapter(bare, tmp_path, is_trainable=True)
    H.close(output(bare, case), want, 1e-6)
    assert {n for n, p in bare.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "oft"])
def test_several_adapters_and_mixed_batches(method, tmp_path):
    case = FIRST[method]
    _, ours = both(case)
    want = output(ours, case)
    api.save_adapter(ours, tmp_path)
    api.load_adapter(ours, tmp_path, "other")
    assert not [n for n, p in ours.named_parameters() if p.requires_grad]
    for parameter in [p for n, p in ours.named_parameters() if ".other" in n]:
        parameter.data.mul_(1.5)
    alone = output(ours, case)
    assert H.differ(alone, want, 1e-6)
    size = len(next(iter(want.values())))
    names = [("default", "other", "__base__")[row % 3] for row in range(size)]
    mixed = output(ours, case, names)
    with api.disable_adapter(ours):
        base = output(ours, case)
    by_name = {"default": want, "other": alone, "__base__": base}
    for key, value in mixed.items():
        H.close({key: value}, {key: torch.stack([by_name[name][key][row] for row, name in enumerate(names)])}, 1e-10)
    api.set_adapter(ours, "default")
    H.close(output(ours, case), want, 1e-12)
    api.delete_adapter(ours, "other")
    assert not [n for n in ours.state_dict() if ".other" in n]
    plain = api.merge_and_unload(ours)
    H.close(H.weighable(case, output(plain, case)), H.weighable(case, want), 1e-8)
    assert not [m for m in plain.modules() if hasattr(m, "base_layer")]


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_peft_reads_what_it_saves(method, ref, tmp_path):
    case = FIRST[method]
    _, ours = both(case)
    api.save_adapter(ours, tmp_path)
    theirs = ref.PeftModel.from_pretrained(case.base.build(torch.float64), tmp_path).eval()
    H.close(H.run(theirs.double(), H.inputs(case, torch.float64)), output(ours, case), 1e-6)


def test_what_concerns_more_than_layers_is_refused():
    for field, value in {"bias": "all", "modules_to_save": ["wide"], "trainable_token_indices": [1]}.items():
        net = FIRST["lora"].base.build()
        before = [*net.state_dict()]
        with pytest.raises(minipeft.NotIncludedError, match=f"{field}.*get_peft_model"):
            api.inject_adapter_in_model(minipeft.LoraConfig(target_modules=["square"], **{field: value}), net)
        assert [*net.state_dict()] == before
    with pytest.raises(minipeft.ConfigError, match="target_modules"):
        api.inject_adapter_in_model(minipeft.LoraConfig(), FIRST["lora"].base.build())
    with pytest.raises(minipeft.NotIncludedError, match="PeftModel"):
        api.inject_adapter_in_model(minipeft.PromptTuningConfig(), FIRST["lora"].base.build())
    with pytest.raises(minipeft.AdapterNameError, match="nobody"):
        api.set_adapter(api.inject_adapter_in_model(minipeft.LoraConfig(target_modules=["square"]),
                                                    FIRST["lora"].base.build()), "nobody")


WITHOUT = """
import json, sys
sys.modules["minipeft.model"] = sys.modules["minipeft.compat"] = None  # whoever imports them fails
from torch import nn
from minipeft.core import api, registry
from minipeft.core.config import CONFIGS, PeftType

left = []
for kind in registry.FILES:
    try:
        registry.load(kind)
    except ModuleNotFoundError:
        left.append(kind)
net = api.inject_adapter_in_model(CONFIGS[PeftType.LORA](target_modules=["0"]), nn.Sequential(nn.Linear(4, 6)))
api.merge_and_unload(net)
print(json.dumps(left))
"""


def test_methods_of_layers_need_the_core_alone():
    assert set(json.loads(run("-c", WITHOUT).stdout.splitlines()[-1])) == {
        "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
        "ADAPTION_PROMPT", "SHADOW",
    }


def test_the_page_runs_and_names_every_function(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "core.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(re.search(r"```python\n(.*?)```", text, re.S)[1], "core.md", "exec"), {})
    own = [name for name, value in vars(api).items() if inspect.isfunction(value) and value.__module__ == api.__name__]
    public = {name for name in own if not name.startswith("_")} | {"disable_adapter", "mixed_batch"}
    assert public == set(re.findall(r"`(\w+)\(", text)) - {"PeftModel"}
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (ROOT / "docs" / link).exists(), link
