"""Names that match nothing beside others that do: those are adapted, as in peft, and one warning names the rest."""

import warnings

import pytest
import torch
from torch import nn

from . import bases as B
from . import harness as H
from .test_layer_kinds import METHODS

ON_LINEAR = [case for case in METHODS if "mlp" in case.base.name and isinstance(case.kwargs["target_modules"], list)]


class Model(nn.Module):
    """An embedding, a layer that stands at two places, and a bare parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(9, 4)
        self.one = nn.Linear(4, 6)
        self.two = nn.ModuleList([self.one, nn.Linear(6, 3)])
        self.part = B.Bare(3, 5)

    def forward(self, x):
        return self.part(self.two[1](torch.tanh(self.one(self.emb(x)))))


def warned(make):
    """What `make()` gives, and the texts of its warnings about names."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = make()
    return made, [str(one.message) for one in seen if "in the model" in str(one.message)]


PARTLY = {  # field: (what is asked for, the name that is nowhere and what is said of it)
    "target_modules": (["two.1", "on"], "'on' matches nothing. Did you mean 'one'?"),
    "modules_to_save": (["two.1", "em"], "'em' matches nothing. Did you mean 'emb'?"),
    "target_parameters": (["part.weight", "part.weigh"], "'part.weigh' matches nothing. Did you mean 'part.weight'"),
    "trainable_token_indices": ({"emb": [1], "embed": [2]}, "'embed' matches nothing. Did you mean 'emb'?"),
}


@pytest.mark.parametrize("field", PARTLY)
def test_some_match(field, lib, ref, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft says nothing")
    given, said = PARTLY[field]
    here = {key: given[key] for key in list(given)[:1]} if isinstance(given, dict) else given[:1]
    fields = {"target_modules": ["one"], "r": 2, field: given}
    model, texts = warned(lambda: lib.get_peft_model(Model(), lib.LoraConfig(**fields)))
    assert len(texts) == 1 and said in texts[0] and field in texts[0]
    H.move(model).save_pretrained(tmp_path)
    x = {"x": torch.arange(8).view(2, 4)}
    want = lib.get_peft_model(Model(), lib.LoraConfig(**{**fields, field: here}))
    H.same_names(model.state_dict(), want.state_dict())
    H.identical(H.run(H.move(want), x), H.run(model, x))
    further = lib.get_peft_model(Model(), lib.LoraConfig(**fields))
    for load in (lambda: lib.PeftModel.from_pretrained(Model(), tmp_path),
                 lambda: further.load_adapter(tmp_path, "other") and further):
        loaded, texts = warned(load)
        assert len(texts) == 1 and said in texts[0]
        loaded.set_adapter(list(loaded.peft_config)[-1])
        H.identical(H.run(loaded, x), H.run(model, x))
    if field not in ("trainable_token_indices", "target_parameters"):  # peft refuses the first, and warns of the second
        H.close(H.run(ref.PeftModel.from_pretrained(Model(), tmp_path), x), H.run(model, x), 1e-6)


@pytest.mark.parametrize("field", PARTLY)
def test_none_match(field, lib, is_ref):
    nowhere = {"zzz": [1]} if isinstance(PARTLY[field][0], dict) else ["zzz", "yyy"]
    fields = {"target_modules": [] if field == "target_parameters" else ["one"], field: nowhere}
    model = Model()
    before = H.snapshot(model)
    if is_ref and field == "modules_to_save":
        pytest.skip("peft trains nothing there, and does not say so")
    with pytest.raises(ValueError, match="zzz" if field != "target_parameters" or not is_ref else ""):
        lib.get_peft_model(model, lib.LoraConfig(r=2, **fields))
    H.identical(H.snapshot(model), before)


def test_both_names_of_one_module(lib):
    model, texts = warned(lambda: lib.get_peft_model(Model(), lib.LoraConfig(r=2, target_modules=["one", "two.0"])))
    assert not texts and model.targeted_module_names == ["one"]
    fields = {"target_modules": ["two.1"], "modules_to_save": ["one", "two.0"]}
    model, texts = warned(lambda: lib.get_peft_model(Model(), lib.LoraConfig(r=2, **fields)))
    assert not texts


def test_a_second_name_alone_is_explained(lib, is_ref):
    if is_ref:
        pytest.skip("peft says that it is not there")
    with pytest.raises(lib.NoMatchingPeftModuleError, match=r"'two\.0' is another name of 'one'"):
        lib.get_peft_model(Model(), lib.LoraConfig(target_modules=["two.0"]))


def test_prompts(lib, is_ref):
    if is_ref:
        pytest.skip("peft says nothing")
    config = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    named = lambda *names: lib.PromptTuningConfig(modules_to_save=list(names), **config)
    _, texts = warned(lambda: lib.get_peft_model(B.LLAMA.build(), named("lm_head", "lm_hea")))
    assert len(texts) == 1 and "'lm_hea' matches nothing. Did you mean 'lm_head'" in texts[0]
    with pytest.raises(lib.PeftError, match="lm_hea"):
        lib.get_peft_model(B.LLAMA.build(), named("lm_hea"))


@pytest.mark.parametrize("case", ON_LINEAR, ids=[case.id for case in ON_LINEAR])
def test_every_method(case, lib, is_ref):
    if is_ref:
        pytest.skip("peft says nothing")
    build = lambda targets: lib.get_peft_model(case.base.build(), H.config(lib, case, target_modules=targets))
    H.seed(0)
    model, texts = warned(lambda: build([*case.kwargs["target_modules"], "q_proj", "v_proj"]))
    assert len(texts) == 1 and "q_proj" in texts[0] and "v_proj" in texts[0]
    H.seed(0)
    H.identical(model.state_dict(), build(case.kwargs["target_modules"]).state_dict())
    with pytest.raises(lib.NoMatchingPeftModuleError, match="q_proj"):
        build(["q_proj"])


@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["q_proj", "w1"], r".*\.w1"], ids=str)
def test_experts_that_are_parameters(targets, lib, is_ref):
    """Their layers of old are one parameter for all experts now; where to name it is said, and naming it works.

    The old names themselves work on some models (test_experts.py), of which this is none.
    """
    if is_ref:
        pytest.skip("peft says nothing")
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**sizes))
    says = r"name 'experts\.gate_up_proj', 'experts\.down_proj' in `target_parameters`"
    if "q_proj" in targets:
        with pytest.warns(lib.PeftWarning, match=says):
            lib.get_peft_model(model, lib.LoraConfig(target_modules=targets))
        return
    with pytest.raises(lib.NoMatchingPeftModuleError, match=says):
        lib.get_peft_model(model, lib.LoraConfig(target_modules=targets))
    named = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = lib.get_peft_model(model, lib.LoraConfig(target_modules=[], target_parameters=named))
    assert len(adapted.targeted_parameter_names) == 2
