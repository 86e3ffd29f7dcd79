"""X-LoRA: several saved LoRA adapters, weighed anew for every token by a classifier that reads the model itself."""

import copy
import functools
import json
import pickle
import re
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from . import bases as B
from . import harness as H
from .test_passes import overlapping

TARGETS = [["q_proj", "v_proj"], ["q_proj", "embed_tokens", "up_proj"], ["down_proj"]]  # of the three adapters
NAMES = "base_model.internal_xlora_classifier"
CASES = {
    "plain": {},
    "deep": {"xlora_depth": 3, "xlora_size": 7},
    "no_dropout": {"xlora_depth": 2, "xlora_size": 7, "xlora_dropout_p": 0.0},
    "layerwise": {"layerwise_scalings": True},
    "layerwise_deep": {"layerwise_scalings": True, "xlora_depth": 4, "xlora_size": 5},
    "linear": {"enable_softmax": False},
    "temperature": {"softmax_temperature": 0.5},
    "top_k": {"top_k_lora": 2, "layerwise_scalings": True},
    "softmax_top_k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "softmax_twice": {"top_k_lora": 2, "enable_softmax_topk": True},
    "softmax_all": {"enable_softmax": False, "enable_softmax_topk": True},
    "global_weight": {"global_scaling_weight": 1.75},
    "pass_value": {"scaling_pass_value": 0.5, "global_scaling_weight": 0.75},
    "pass_value_top_k": {"scaling_pass_value": 0.5, "top_k_lora": 1},
    "pass_value_softmax_top_k": {"scaling_pass_value": 0.5, "top_k_lora": 2, "enable_softmax_topk": True},
    "trained": {"use_trainable_adapters": True},
}


def without_cache(base, dtype=torch.float32):
    model = base.build(dtype)
    model.config.use_cache = False
    return model


def llama(dtype=torch.float32):
    return without_cache(B.LLAMA, dtype)


def save_adapters(lib, folder, make=llama, targets=TARGETS, **more):
    """LoRA adapters of different ranks on disk: {"0": folder, ...}."""
    found = {}
    for i, modules in enumerate(targets):
        H.seed(i)
        config = lib.LoraConfig(target_modules=modules, r=2 + i, lora_alpha=5 + i, use_rslora=i == 1,
                                init_lora_weights=False, **more)
        found[str(i)] = str(folder / f"lora{i}")
        lib.get_peft_model(make(), config).save_pretrained(found[str(i)], save_embedding_layers=False)
    return found


@pytest.fixture(scope="session")
def adapters(ref, tmp_path_factory):
    pytest.importorskip("transformers")
    return save_adapters(ref, tmp_path_factory.mktemp("xlora"), lora_dropout=0.25)


def config(lib, named, **given):
    return lib.XLoraConfig(**{"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": dict(named), **given})


def adapt(lib, adapters, base=None, dtype=torch.float32, **given):
    """In eval mode, with a classifier that is moved far enough to tell the tokens apart."""
    H.seed(0)
    model = lib.get_peft_model(llama() if base is None else base, config(lib, adapters, **given)).eval().to(dtype)
    model.base_model.internal_xlora_classifier.dtype = dtype  # the reference notes the one it was made in
    return H.move(model, 1.0, only=lambda name, p: "xlora_classifier" in name)


def pair(ref, lib, adapters, dtype=torch.float64, **given):
    theirs, ours = (adapt(module, adapters, dtype=dtype, **given) for module in (ref, lib))
    return theirs, H.copy_values(theirs, ours)


def of_adapters(name, p):
    return re.search(r"\.lora_(embedding_)?[AB]\.", name)


def batch(seed=7):
    return B.LLAMA.inputs(seed=seed)


def results(model, batch, **more):
    with torch.no_grad():
        out = model(**batch, **more)
    found = {"logits": out.logits, "loss": out.loss, "scalings": model.get_latest_scalings()}
    return {k: v.clone() for k, v in found.items()}


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------- the same as the reference
@pytest.mark.parametrize("name", CASES)
def test_names_and_counts(name, lib, ref, adapters):
    theirs, ours = (adapt(module, adapters, **CASES[name]) for module in (ref, lib))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    state = {k: v for k, v in theirs.state_dict().items() if "xlora_classifier" not in k}
    H.identical({k: ours.state_dict()[k] for k in state}, state)
    of = lambda model: {n: (p.requires_grad, p.shape, p.dtype) for n, p in model.named_parameters()}
    assert of(ours) == of(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for attribute in ("active_adapter", "active_adapters"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert list(ours.peft_config) == list(theirs.peft_config) == ["default", "0", "1", "2"]
    got, want = ([vars(row) for row in model.get_layer_status()] for model in (ours, theirs))
    assert [{**row, "module_type": None} for row in got] == [{**row, "module_type": None} for row in want]
    assert ours.get_model_status() == type(ours.get_model_status())(**vars(theirs.get_model_status()))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, lib, ref, adapters):
    theirs, ours = pair(ref, lib, adapters, **CASES[name])
    if name == "trained":
        for model in (theirs, ours):
            H.move(model, only=of_adapters)
    want = results(theirs, batch())
    H.close(results(ours, batch()), want, 2e-6)
    assert want["scalings"].shape == (4, 5, 9, 3)
    H.close(gradients(ours, batch()), gradients(theirs, batch()), 2e-6)
    base = llama(torch.float64)(**batch())
    assert (want["logits"] - base.logits).abs().max() > 0.05, "the adapters do nothing"
    assert (want["scalings"][:, 0] - want["scalings"][:, 1]).abs().max() > 0.05, "every token is the same"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, lib, ref, adapters):
    theirs, ours = (adapt(module, adapters, base=llama(dtype), dtype=dtype) for module in (ref, lib))
    H.copy_values(theirs, ours)
    H.close(results(ours, batch()), results(theirs, batch()), H.TOLERANCE[dtype])


def test_classifiers(lib, ref, tmp_path):
    """Of whole sequences; their adapters have no head of their own, and X-LoRA trains none."""
    make = functools.partial(without_cache, B.LLAMA_SEQ)
    lora = save_adapters(ref, tmp_path, make, TARGETS[:1])
    theirs, ours = (adapt(m, lora, make(), torch.float64, task_type="SEQ_CLS") for m in (ref, lib))
    H.copy_values(theirs, ours)
    inputs = B.LLAMA_SEQ.inputs()
    H.close(results(ours, inputs), results(theirs, inputs), 2e-6)
    H.close(gradients(ours, inputs), gradients(theirs, inputs), 2e-6)


def test_while_training(lib, ref, adapters):
    """With dropout in the adapters and in the classifier, at equal seeds."""
    models = pair(ref, lib, adapters, xlora_depth=2, xlora_size=9, use_trainable_adapters=True)
    found = []
    for model in models:
        H.seed(5)
        found.append((results(model.train(), batch()), gradients(model, batch())))
    for got, want in zip(*reversed(found)):
        H.close(got, want, 2e-6)
    assert H.differ(results(models[1].eval(), batch()), found[1][0], 1e-3)


def test_settings(lib, ref, adapters):
    theirs, ours = pair(ref, lib, adapters)
    start = results(ours, batch())
    for setter, value in (("set_topk_lora", 1), ("set_global_scaling_weight", 0.5), ("set_scaling_pass_value", None),
                          ("set_scaling_pass_value", 0.25), ("set_topk_lora", None)):
        for model in (theirs, ours):
            getattr(model, setter)(value)
        H.close(results(ours, batch()), results(theirs, batch()), 2e-6)
        assert ours.get_global_scaling_weight() == theirs.get_global_scaling_weight()
        one, other = (m.internal_xlora_classifier for m in (ours, theirs))
        assert one.override_scaling_pass_value == other.override_scaling_pass_value
        same = ("top_k_lora", "global_scaling_weight", "scaling_pass_value")
        assert [getattr(one.config, n) for n in same] == [getattr(other.config, n) for n in same]
    assert H.differ(results(ours, batch()), start, 1e-2)


def test_generate_and_log(lib, ref, adapters):
    ids = batch()["input_ids"][:2]
    found = []
    for model in pair(ref, lib, adapters, layerwise_scalings=True):
        assert model.get_scalings_log() == [] and model.get_latest_scalings() is None
        model.enable_scalings_logging()
        tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        beams = model.generate(input_ids=ids, max_new_tokens=3, num_beams=2, do_sample=False, eos_token_id=None)
        model.disable_scalings_logging()
        model(input_ids=ids)
        log, buckets = model.get_scalings_log(), model.get_bucketed_scalings_log()
        assert [s.shape[:2] for s in log] == [(2, 5), (2, 6), (2, 7), (2, 8), (4, 5), (4, 6), (4, 7)]
        assert {length: places for length, (places, _) in buckets.items()} == {5: [0, 4], 6: [1, 5], 7: [2, 6], 8: [3]}
        assert all(t is log[p] for places, tensors in buckets.values() for p, t in zip(places, tensors))
        found.append({"tokens": tokens, "beams": beams, **{f"log{i}": s.detach() for i, s in enumerate(log)}})
        log.clear()
        assert len(model.get_scalings_log()) == 7
        model.clear_scalings_log()
        assert model.get_scalings_log() == []
    H.close(found[1], found[0], 2e-6)


def test_disabled(lib, adapters):
    model = adapt(lib, adapters)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        want, before = llama()(**batch()).logits, model(**batch()).logits
        with model.disable_adapter():
            H.identical({"y": model(**batch()).logits}, {"y": want})
            assert model.base_model.disabled
        assert not model.base_model.disabled
        H.identical({"y": model(**batch()).logits}, {"y": before})
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


# --------------------------------------------------------------------------------------------------------- checkpoints
def classifier_of(model):
    """What the reference means to save: the tensors that it picks before it filters them by adapter name."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k.startswith(NAMES)}


@pytest.mark.parametrize("name", ["plain", "deep", "layerwise_deep"])
def test_saved(name, lib, ref, adapters, tmp_path):
    theirs, ours = pair(ref, lib, adapters, dtype=torch.float32, **CASES[name])
    want = H.saved(theirs, tmp_path / "theirs")[1]
    tensors, got = H.saved(ours, tmp_path / "ours", save_embedding_layers=False)
    H.identical(tensors, classifier_of(theirs))
    H.same_config(got, want)
    for expert, folder in adapters.items():  # each is a LoRA that anyone can load
        H.identical(H.stored(tmp_path / "ours" / expert)[0], H.stored(type(tmp_path)(folder))[0])
        ref.PeftModel.from_pretrained(llama(), str(tmp_path / "ours" / expert))
    loaded = ref.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    H.close(results(loaded, batch()), results(ours, batch()), 2e-5)


@pytest.mark.parametrize("name", ["plain", "deep", "layerwise_deep"])
def test_loading_from_the_reference(name, lib, ref, adapters, tmp_path):
    """Its configuration as it is, its tensors as releases up to 0.19 write them: see test_reference_saves_nothing."""
    theirs = adapt(ref, adapters, **CASES[name])
    H.saved(theirs, tmp_path)
    safetensors.torch.save_file(classifier_of(theirs), tmp_path / "adapter_model.safetensors", {"format": "pt"})
    ours = lib.PeftModel.from_pretrained(llama(), str(tmp_path))
    H.close(results(ours, batch()), results(theirs, batch()), 2e-5)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    ours = lib.PeftModel.from_pretrained(llama(), str(tmp_path), is_trainable=True)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(classifier_of(theirs))
    with torch.no_grad():
        ours.internal_xlora_classifier.layers[0].weight.zero_()
    ours.load_adapter(str(tmp_path), "default")
    H.close(results(ours, batch()), results(theirs, batch()), 2e-5)


def test_reference_saves_nothing(lib, ref, adapters, tmp_path):
    """0.21.2 takes the "0" of `layers.0` for an adapter's name, and loses the classifier: said, not guessed."""
    assert H.saved(adapt(ref, adapters), tmp_path)[0] == {}
    base = llama()
    with pytest.raises(lib.CheckpointError, match=r"2 missing tensor.*internal_xlora_classifier.layers.0"):
        lib.PeftModel.from_pretrained(base, str(tmp_path))
    untouched(base)


def test_trained_adapters_come_back(lib, ref, adapters, tmp_path):
    model = H.move(adapt(lib, adapters, use_trainable_adapters=True), only=of_adapters)
    H.saved(model, tmp_path / "all")
    again = lib.PeftModel.from_pretrained(llama(), str(tmp_path / "all"))
    H.close(results(again, batch()), results(model, batch()), 1e-6)
    own = {str(i): str(tmp_path / "all" / str(i)) for i in range(3)}
    H.same_config(json.loads(again.peft_config["default"].to_json())["adapters"], own)
    old = lib.PeftModel.from_pretrained(llama(), str(tmp_path / "all"), adapters=adapters)
    assert H.differ(results(old, batch()), results(model, batch()), 1e-3)
    theirs = ref.get_peft_model(llama(), config(ref, own)).eval()
    ref.set_peft_model_state_dict(theirs, H.stored(tmp_path / "all")[0])
    H.close(results(theirs, batch()), results(model, batch()), 2e-5)


def test_adapters_that_have_gone(lib, adapters, tmp_path):
    """Frozen adapters are taken from where they were; from the checkpoint if they are not there any more."""
    lora = save_adapters(lib, tmp_path)
    model = adapt(lib, lora)
    H.saved(model, tmp_path / "all")
    assert lib.PeftConfig.from_pretrained(tmp_path / "all").adapters == lora
    (tmp_path / "lora1").rename(tmp_path / "moved")
    again = lib.PeftModel.from_pretrained(llama(), str(tmp_path / "all"))
    assert again.peft_config["default"].adapters == {**lora, "1": str(tmp_path / "all" / "1")}
    H.close(results(again, batch()), results(model, batch()), 1e-6)


def test_adapters_from_the_hub(lib, adapters, tmp_path, monkeypatch):
    """A hub id names folders inside itself; here the hub is a folder."""
    hub = pytest.importorskip("huggingface_hub")
    model = H.move(adapt(lib, adapters, use_trainable_adapters=True), only=of_adapters)
    H.saved(model, tmp_path / "some" / "xlora")

    def download(repo, filename, subfolder=None, **options):
        assert options == {"revision": "v1"}
        path = tmp_path / repo / (subfolder or "") / filename
        if not path.is_file():
            raise OSError(f"no {path}")
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path / "some")
    again = lib.PeftModel.from_pretrained(llama(), "some/xlora", revision="v1")
    H.close(results(again, batch()), results(model, batch()), 1e-6)


def test_tensors_of_one_adapter(lib, adapters, tmp_path):
    model = adapt(lib, adapters)
    live = {k: v + 1 for k, v in model.state_dict().items()}
    for name, count in (("default", 2), ("0", 8), ("2", 4)):
        own = lib.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        given = lib.get_peft_model_state_dict(model, live, name, save_embedding_layers=False)
        assert len(own) == count
        H.identical(given, {k: v + 1 for k, v in own.items()})
    before = results(model, batch())
    H.move(model, only=of_adapters)
    assert H.differ(results(model, batch()), before, 1e-3)
    for name, folder in adapters.items():
        model.load_adapter(folder, name)
    H.identical(results(model, batch()), before)


def test_empty_classifier(lib, adapters):
    """With low_cpu_mem_usage it waits for its values on the meta device."""
    want = adapt(lib, adapters)
    model = lib.get_peft_model(llama(), config(lib, adapters), low_cpu_mem_usage=True).eval()
    assert {p.device.type for p in model.internal_xlora_classifier.parameters()} == {"meta"}
    lib.set_peft_model_state_dict(model, classifier_of(want))
    H.identical(results(model, batch()), results(want, batch()))


# ---------------------------------------------------------------------------------------------------------------- laws
def check_formula(model, call):
    """Every adapted layer is W x + g sum_i p_i s_i B_i A_i x of its own input, and p is what the classifier says."""
    seen, handles = [], []
    for layer in (m for m in model.modules() if hasattr(m, "base_layer")):
        handles.append(layer.register_forward_hook(lambda *a: seen.append(a)))
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    p = model.get_latest_scalings()
    first, second = seen[: len(handles)], seen[len(handles) :]
    assert len(first) == len(second)
    for k, (layer, (x,), y) in enumerate(second):
        with torch.no_grad():
            want = layer.base_layer(x)
            for i in range(p.shape[-1]):
                name = str(i)
                if name in getattr(layer, "lora_A", {}):
                    part = layer.lora_B[name](layer.lora_A[name](x))
                elif name in getattr(layer, "lora_embedding_A", {}):
                    part = layer.lora_embedding_A[name].T[x] @ layer.lora_embedding_B[name].T
                else:
                    continue
                want = want + p[..., k, i, None] * layer.scaling[name] * part
        H.close({"y": y}, {"y": want}, 1e-10)
    return p


def plain_gpt2(dtype=torch.float64):
    return without_cache(B.GPT2, dtype)


def test_gpt2(lib, tmp_path):
    """The reference finds no LoRA keys in a model without a child `model`; here the formula is the judge."""
    lora = save_adapters(lib, tmp_path, plain_gpt2, [["c_attn"], ["c_fc", "wte", "wpe"]])
    model = adapt(lib, lora, plain_gpt2(), torch.float64, layerwise_scalings=True)
    inputs = B.GPT2.inputs()
    del inputs["labels"]
    one = {k: v[:1] for k, v in inputs.items()}
    for given in (inputs, one):
        p = check_formula(model, functools.partial(model, **given))
        h = plain_gpt2()(**given, output_hidden_states=True).hidden_states[-1]
        logits = model.internal_xlora_classifier.layers(h).unflatten(-1, p.shape[-2:])
        H.close({"p": p}, {"p": torch.softmax(logits, -1)}, 1e-10)


class Reader(nn.Module):
    """No part of transformers: words in, hidden states out; a dict or an object."""

    def __init__(self, as_dict=False):
        super().__init__()
        H.seed(1)
        self.words, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 10), nn.Linear(10, 3)
        self.as_dict = as_dict
        self.eval()

    def forward(self, words, output_hidden_states=False):
        hidden = torch.tanh(self.mix(self.words(words)))
        out = {"logits": self.head(hidden)} | ({"hidden_states": [hidden]} if output_hidden_states else {})
        return out if self.as_dict else SimpleNamespace(**out)


@pytest.mark.parametrize("as_dict", [False, True])
def test_modules_of_ones_own(as_dict, lib, tmp_path):
    make = lambda: Reader(as_dict).double()
    lora = save_adapters(lib, tmp_path, make, [["mix"], ["words", "head"]])
    named = {"chemistry": lora["0"], "poetry": lora["1"]}
    model = adapt(lib, named, make(), torch.float64, task_type=None, hidden_size=10)
    words = torch.tensor([[1, 2, 3], [4, 5, 6]])
    p = check_formula(model, lambda: model(words))
    assert p.shape == (2, 3, 3, 2)
    H.saved(model, tmp_path / "all")
    again = lib.PeftModel.from_pretrained(make(), str(tmp_path / "all"))
    check_formula(again, lambda: again(words))
    H.close({"p": again.get_latest_scalings()}, {"p": p}, 1e-12)
    check_formula(other := pickle.loads(pickle.dumps(again)), lambda: other(words))
    H.identical({"p": other.get_latest_scalings()}, {"p": p})


def test_names_of_adapters(lib, adapters):
    """They may be called anything; inside, they are "0", "1", ... as in the reference."""
    named = dict(zip(("a", "layers", "3"), adapters.values()))
    H.identical(results(adapt(lib, named), batch()), results(adapt(lib, adapters), batch()))


def test_copies(lib, adapters):
    """Also after a run that left a graph."""
    model = adapt(lib, adapters)
    want = results(model, batch())
    gradients(model, batch())
    other = copy.deepcopy(model)
    assert other.get_latest_scalings() is None
    model.set_global_scaling_weight(0.0)
    H.identical(results(other, batch()), want)


def test_gradient_checkpointing(lib, tmp_path, ref):
    model = adapt(lib, save_adapters(ref, tmp_path), use_trainable_adapters=True)
    want = gradients(model, batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    H.close(gradients(model.train(), batch()), want, 1e-5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(want)


def test_unload(lib, adapters):
    model = adapt(lib, adapters)
    results(model, batch())
    base = model.unload()
    untouched(base, frozen=True)
    assert not base._forward_pre_hooks and not base._forward_hooks
    with torch.no_grad():
        H.identical({"y": base(**batch()).logits}, {"y": llama()(**batch()).logits})


# ------------------------------------------------------------------------------------------------------------ refusals
def untouched(base, frozen=False):
    """Nothing of the model has changed."""
    H.identical(base.state_dict(), llama().state_dict())
    assert frozen or all(p.requires_grad for p in base.parameters())
    assert "peft_config" not in vars(base)


def change(folder, into, **fields):
    """A saved adapter with other fields in its configuration."""
    into.mkdir()
    path = type(into)(folder)
    (into / "adapter_model.safetensors").write_bytes((path / "adapter_model.safetensors").read_bytes())
    written = json.loads((path / "adapter_config.json").read_text())
    (into / "adapter_config.json").write_text(json.dumps({**written, **fields}))
    return str(into)


FIELDS = {
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "pissa": {"init_lora_weights": "pissa"},
    "replication": {"layer_replication": [[0, 2]]},
    "rank": {"r": 9},
    "other_method": {"peft_type": "IA3"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_unfit_adapters(name, lib, adapters, tmp_path):
    """One of them in the last place: the model is then as it was before the first."""
    base = llama()
    bad = {**adapters, "2": change(adapters["0"], tmp_path / "bad", **FIELDS[name])}
    with pytest.raises(lib.PeftError, match=r"Adapter '2' of X-LoRA"):
        lib.get_peft_model(base, config(lib, bad))
    untouched(base)
    lib.get_peft_model(base, config(lib, adapters))


def test_embeddings_beside_the_adapters(lib, adapters, tmp_path):
    """A LoRA on an embedding may be saved with the embedding itself, which all adapters must agree on."""
    base = llama()
    model = lib.get_peft_model(base, lib.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    with_embedding = tmp_path / "lora"
    assert len(H.saved(model, with_embedding)[0]) == 3
    lib.get_peft_model(llama(), config(lib, {**adapters, "2": str(with_embedding)}))
    with torch.no_grad():
        base.model.embed_tokens.base_layer.weight += 1
    H.saved(model, with_embedding)
    base = llama()
    with pytest.raises(lib.CheckpointError, match=r"Adapter '2'.*embed_tokens.base_layer.weight' with other values"):
        lib.get_peft_model(base, config(lib, {**adapters, "2": str(with_embedding)}))
    untouched(base)


@pytest.mark.parametrize("given, message", [
    ({"adapters": {}}, "`adapters` is empty"),
    ({"adapters": {"a": "nowhere/at/all"}}, "Adapter 'a' of X-LoRA, from 'nowhere/at/all'"),
    ({"top_k_lora": 4}, "from 1 to 3"),
    ({"top_k_lora": 0}, "top_k_lora"),
    ({"xlora_depth": 0}, "xlora_depth"),
    ({"softmax_temperature": 0.0}, "softmax_temperature"),
    ({"xlora_dropout_p": 1.0}, "xlora_dropout_p"),
])
def test_unfit_configurations(given, message, lib, adapters):
    base = llama()
    with pytest.raises(lib.PeftError, match=message):
        lib.get_peft_model(base, config(lib, adapters, **given))
    untouched(base)


def test_unfit_models(lib, adapters):
    base = llama()
    base.config.use_cache = True
    with pytest.raises(lib.ConfigError, match="use_cache"):
        lib.get_peft_model(base, config(lib, adapters))
    untouched(base)
    with pytest.raises(lib.AdapterNameError, match="'1' cannot be"):
        lib.get_peft_model(llama(), config(lib, adapters), adapter_name="1")
    with pytest.raises(lib.ConfigError, match="output_hidden_states"):
        lib.get_peft_model(nn.Sequential(nn.Linear(3, 3)), config(lib, adapters, task_type=None))
    with pytest.raises(lib.UnsupportedFeatureError, match="get_peft_model"):
        lib.inject_adapter_in_model(config(lib, adapters), llama())


def test_layers_without_tokens(lib, tmp_path):
    """Where the reference multiplies tensors that have nothing to do with each other, or fails inside torch."""
    class Pooled(Reader):
        def forward(self, words, output_hidden_states=False):
            hidden = torch.tanh(self.mix(self.words(words)))
            out = {"logits": self.head(hidden.mean(1))}
            return out | ({"hidden_states": [hidden]} if output_hidden_states else {})

    model = adapt(lib, save_adapters(lib, tmp_path, Pooled, [["mix", "head"]]), Pooled(), task_type=None,
                  hidden_size=10)
    with pytest.raises(lib.BatchError, match=r"'head' should put out \(batch, length"):
        model(torch.tensor([[1, 2, 3]]))


def test_refused_later(lib, adapters):
    model = adapt(lib, adapters)
    want = results(model, batch())
    for call, error in (
        (lambda: model.merge_adapter(), lib.MergeError),
        (lambda: model.merge_and_unload(), lib.MergeError),
        (lambda: model(**batch(), adapter_names=["0", "1", "2", "0"]), lib.BatchError),
        (lambda: model(**batch(), past_key_values=((0, 0),)), lib.BatchError),
        (lambda: model.get_base_model().model(batch()["input_ids"]), lib.BatchError),
        (lambda: model.add_adapter("other", config(lib, adapters)), lib.UnsupportedFeatureError),
        (lambda: model.load_adapter(adapters["0"], "other"), lib.ConfigError),
        (lambda: model.delete_adapter("default"), lib.UnsupportedFeatureError),
        (lambda: model.delete_adapter("0"), lib.UnsupportedFeatureError),
        (lambda: model.set_adapter("0"), lib.AdapterNameError),
        (lambda: model.set_topk_lora(4), lib.ConfigError),
    ):
        with torch.no_grad(), pytest.raises(error):
            call()
        H.identical(results(model, batch()), want)
    model.set_adapter("default")
    with pytest.raises(lib.BatchError, match="hidden_size is 7"):
        adapt(lib, adapters, hidden_size=7)(**batch())


# ------------------------------------------------------------------------- where the reference is at odds with itself
def test_reference_needs_names_that_are_numbers(ref, adapters):
    with pytest.raises(KeyError, match="a"):
        adapt(ref, dict(zip("abc", adapters.values())))(**batch())


def test_reference_merges_what_cannot_be_merged(ref, adapters):
    model = adapt(ref, adapters)
    before = results(model, batch())["logits"]
    model.merge_adapter()
    assert (results(model, batch())["logits"] - before).abs().max() > 0.05


def test_reference_saves_broken_adapters(ref, adapters, tmp_path):
    H.saved(adapt(ref, adapters, use_trainable_adapters=True), tmp_path)
    got = H.stored(tmp_path / "0")[0]
    assert any("embed_tokens.base_layer" in key for key in got), "tensors of the base model"
    assert not any("layers.1." in key for key in got), "the second layer is lost"


def test_reference_does_not_copy(ref, adapters):
    model = adapt(ref, adapters)
    model(**batch())
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)


def test_reference_ignores_given_adapters(ref, adapters, tmp_path):
    H.saved(adapt(ref, adapters), tmp_path)
    model = ref.PeftModel.from_pretrained(llama(), str(tmp_path), adapters={"0": "nowhere"})
    assert model.peft_config["default"].adapters == adapters


def test_reference_checkpoints_other_gradients(ref, tmp_path):
    model = adapt(ref, save_adapters(ref, tmp_path))
    want = gradients(model, batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        assert H.differ(gradients(model, batch()), want, 1e-3)
    except RuntimeError as error:  # torch notices that something else was computed
        assert "recompute" in str(error)


def test_reference_lora_bias_has_no_weight(lib, ref, tmp_path):
    """With all weights 0 the reference still adds the bias of B; here an adapter without weight does nothing."""
    def make_bias(module):
        for i, folder in save_adapters(module, tmp_path / module.__name__, targets=TARGETS[:1]).items():
            H.seed(int(i))
            model = module.get_peft_model(llama(), module.LoraConfig(target_modules=TARGETS[0], lora_bias=True))
            H.move(model)
            model.save_pretrained(folder)
            yield i, folder

    base = llama()(**batch()).logits
    for module, at_odds in ((ref, True), (lib, False)):
        model = adapt(module, dict(make_bias(module)), global_scaling_weight=1.0, enable_softmax=False)
        with torch.no_grad():
            for p in model.internal_xlora_classifier.parameters():
                p.zero_()
        assert ((model(**batch()).logits - base).abs().max() > 1e-3) == at_odds


def test_overlapping_calls(lib, is_ref, adapters):
    """The weights of a pass are its thread's own."""
    if is_ref:
        pytest.skip("peft keeps them on the model")
    model = adapt(lib, adapters)
    layer = model.base_model.model.get_submodule("model.layers.1.mlp.down_proj").base_layer
    batches = [batch(seed) for seed in (7, 8)]
    alone = [H.run(model, one) for one in batches]
    assert H.differ(*alone, 1e-3)
    seen = []
    layer.register_forward_pre_hook(lambda *args: seen.append(args))
    for one, other in zip(overlapping(model, *batches, at=layer), alone):
        H.identical(one, other)
    assert len(seen) == 4  # each call runs the model twice


def test_gradients_after_another_pass(lib, is_ref, adapters):
    """Checkpointed blocks run again with the weights of their own pass."""
    if is_ref:
        pytest.skip("peft keeps them on the model")
    grads = []
    for again in (False, True):
        model = adapt(lib, adapters, use_trainable_adapters=True)
        if again:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            module.training = again  # without the adapters' dropout
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        first, second = model(**batch(7)), model(**batch(8))
        first.loss.backward()
        second.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    H.close(grads[1], grads[0], 1e-5)
