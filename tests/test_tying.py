"""Adapters on an embedding and the head that shares its weight: as peft ties them, and where peft loses the tie."""

import copy
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

import minipeft
from minipeft.core.errors import PeftError
from minipeft.model.tying import input_embedding, tied_names

transformers = pytest.importorskip("transformers")
X = torch.tensor([[1, 2, 3, 9]])


def llama(tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, tie_word_embeddings=tied, **small)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def adapted(lib, method, base=None, move=True, **fields):
    """A model with an adapter, every trainable tensor moved away from its initial value."""
    base = llama() if base is None else base
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(base, getattr(lib, f"{method}Config")(**fields))
    torch.manual_seed(2)
    for _, p in model.named_parameters():
        if p.requires_grad and move:
            p.data += 0.3 * torch.randn(p.shape)
    return model


def run(model, x=X):
    with torch.no_grad():
        return model(input_ids=x).logits


LORA = {"method": "Lora", "target_modules": ["q_proj"]}
HEAD = {"method": "Lora", "target_modules": ["lm_head"], "ensure_weight_tying": True}
TIED = {
    "save_embedding": {**LORA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "save_head": {**LORA, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "save_both": {**LORA, "modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "embedding": {"method": "Lora", "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "head": {"method": "Lora", "target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True, "r": 3},
    "both": {"method": "Lora", "target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "init_false": {**HEAD, "init_lora_weights": False},
    "gaussian": {**HEAD, "init_lora_weights": "gaussian"},
    "regex_head": {"method": "Lora", "target_modules": ".*q_proj|lm_head", "ensure_weight_tying": True},
    "regex_embedding": {"method": "Lora", "target_modules": ".*q_proj|.*embed_tokens", "ensure_weight_tying": True},
    "tokens": {**LORA, "trainable_token_indices": [1, 3]},
    "tokens_ensured": {**LORA, "trainable_token_indices": [1, 3], "ensure_weight_tying": True},
    "tokens_by_name": {**LORA, "trainable_token_indices": {"embed_tokens": [1, 3]}},
    "tokens_of_both": {**LORA, "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 3]}},
    "tokens_alone": {"method": "TrainableTokens", "token_indices": [1, 3]},
}
LOOSE = {
    "save_embedding": {**LORA, "modules_to_save": ["embed_tokens"]},
    "both": {"method": "Lora", "target_modules": ["lm_head", "embed_tokens"]},
    "embedding": {"method": "Lora", "target_modules": ["embed_tokens"]},
    "head": {"method": "Lora", "target_modules": ["lm_head"]},
    "tokens_that_differ": {**LORA, "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}},
    "tokens_of_the_head": {**LORA, "trainable_token_indices": {"lm_head": [2]}},
    "ia3": {"method": "IA3", "target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
}


def pair(fields, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed: there is nothing to compare with")
    return adapted(peft, **fields, **options), adapted(minipeft, **fields, **options)


@pytest.mark.parametrize("case", [*TIED, *(f"loose_{name}" for name in LOOSE)])
def test_as_peft(case, tmp_path):
    """Names, initial values, trainable set, counts, outputs, gradients, saved tensors, configuration."""
    fields = TIED.get(case) or LOOSE[case.removeprefix("loose_")]
    theirs, ours = pair(fields, move=False)
    got, want = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(want) or sorted(got) == sorted(want)
    if case != "gaussian":  # drawn by peft into transposed memory, in an order of its own
        assert all(torch.equal(got[k], want[k]) for k in want)
    theirs, ours = pair(fields)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for kind in (True, False):
        one, two = ([n for n, p in m.named_parameters() if p.requires_grad is kind] for m in (ours, theirs))
        assert sorted(one) == sorted(two)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(run(ours), run(theirs), rtol=0, atol=1e-5)
    grads = []
    for model in (ours, theirs):
        (model(input_ids=X).logits ** 2).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[1].items():
        torch.testing.assert_close(grads[0][name], want, rtol=1e-4, atol=1e-4, msg=name)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(str(tmp_path / name))
    saved = [safetensors.torch.load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][k], saved[1][k]) for k in saved[1])
    configs = [m.peft_config["default"].to_dict() for m in (ours, theirs)]
    assert all(configs[0][k] == configs[1][k] for k in configs[0].keys() & configs[1].keys() - {"peft_version"})


@pytest.mark.parametrize("case", TIED)
def test_reload(case, tmp_path):
    """In both, and as a second adapter here."""
    model = adapted(minipeft, **TIED[case])
    model.save_pretrained(str(tmp_path))
    want = run(model)
    assert torch.equal(run(minipeft.PeftModel.from_pretrained(llama(), tmp_path)), want)
    other = adapted(minipeft, **TIED[case])
    other.load_adapter(str(tmp_path), "again")
    other.set_adapter("again")
    assert torch.equal(run(other), want)
    peft = pytest.importorskip("peft")
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(llama(), tmp_path)), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("how", ["as it is", "copied", "cast", "second"])
def test_tied_stays_tied(case, how):
    """Training, casting, copying and a second adapter: what the head reads is what the embedding gives."""
    model = adapted(minipeft, **TIED[case])
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "cast":
        model = model.double()
    elif how == "second":
        fields = {k: v for k, v in TIED[case].items() if k != "method"}
        config = getattr(minipeft, f"{TIED[case]['method']}Config")(**fields)
        model.add_adapter("other", config)
        model.set_adapter("other")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (model(input_ids=X).logits ** 2).mean().backward()
        optimizer.step()
    base = model.get_base_model()
    dim = base.config.hidden_size
    with torch.no_grad():
        model(input_ids=X)
        rows = base.get_input_embeddings()(torch.arange(20))  # (tokens, dim)
        head = base.lm_head(torch.eye(dim, dtype=rows.dtype)).T  # (tokens, dim)
    torch.testing.assert_close(head, rows, rtol=0, atol=1e-5)
    plain = llama().to(rows.dtype).model.embed_tokens.weight
    assert (rows - plain).abs().max() > (0 if how == "second" else 0.01)


@pytest.mark.parametrize("case", [*TIED, *(f"loose_{name}" for name in LOOSE)])
def test_running_equals_merging(case):
    """Merging keeps tied what is tied, and gives a weight of its own to what is not; unmerging restores every bit."""
    fields = TIED.get(case) or LOOSE[case.removeprefix("loose_")]
    model = adapted(minipeft, **fields)
    base = model.get_base_model()
    before, want = {k: v.clone() for k, v in model.state_dict().items()}, run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            model.merge_adapter()
            torch.testing.assert_close(run(model), want, rtol=0, atol=1e-5)
            model.unmerge_adapter()
            after = model.state_dict()
            assert all(torch.equal(after[k], before[k]) for k in before)
            assert torch.equal(run(model), want)
        merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), want, rtol=0, atol=1e-5)
    tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert tied is (case in TIED)
    assert merged.config.tie_word_embeddings is tied and merged is base


def test_merging_warns():
    model = adapted(minipeft, **TIED["embedding"])
    with pytest.warns(UserWarning, match="tie_word_embeddings=True.*tied_target_modules"):
        model.merge_adapter()
    model = adapted(minipeft, **LOOSE["both"])
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        model.merge_and_unload()


def test_merging_an_untied_adapter_on_top_of_a_tied_one_is_refused():
    model = adapted(minipeft, **TIED["embedding"])
    model.add_adapter("loose", minipeft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.merge_adapter(["default"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PeftError, match="unmerge first"):
        model.base_model.merge_adapter(["loose"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "loose"])
    want = run(model)
    model.base_model.merge_adapter(["default", "loose"])
    torch.testing.assert_close(run(model), want, rtol=0, atol=1e-5)


def test_low_precision_base_stays_tied():
    """The adapter is cast to float32, where peft loses the tie."""
    model = adapted(minipeft, **TIED["embedding"], base=llama(dtype=torch.bfloat16))
    embedding, head = model.get_base_model().model.embed_tokens, model.get_base_model().lm_head
    assert head.lora_A["default"].weight.dtype == torch.float32
    assert head.lora_A["default"].weight.data_ptr() == embedding.lora_embedding_B["default"].data_ptr()


def test_a_checkpoint_that_is_not_tied_is_loaded_as_it_is(tmp_path):
    model = adapted(minipeft, **TIED["embedding"])
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    safetensors.torch.save_file(tensors, path)
    with pytest.warns(UserWarning, match="not the same on 'lm_head' and 'model.embed_tokens'"):
        ours = minipeft.PeftModel.from_pretrained(llama(), tmp_path)
    got = {k: v for k, v in ours.state_dict().items() if "lm_head.lora_A" in k}
    assert torch.equal(*got.values(), tensors["base_model.model.lm_head.lora_A.weight"])
    want = run(ours)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(run(merged), want, rtol=0, atol=1e-5)


def test_warnings_as_peft():
    """For each configuration, the same warning or none; in the words of both."""
    peft = pytest.importorskip("peft")
    words = {
        "loose": ({**LORA, "modules_to_save": ["lm_head"]}, {}, "`ensure_weight_tying` is not set to True"),
        "no_way": (LOOSE["ia3"], {}, "no implementation exists to tie the adapters"),
        "nothing": ({**LORA, "ensure_weight_tying": True}, {}, "no tied modules are added in either"),
        "not_tied": ({**TIED["head"]}, {"tied": False}, "no tied modules were found in the model"),
        "tokens": ({**TIED["tokens_ensured"]}, {"tied": False}, "model does not have tied weights"),
    }
    for fields, base, message in words.values():
        fields = dict(fields)
        config = f"{fields.pop('method')}Config"
        for lib in (peft, minipeft):
            with pytest.warns(UserWarning, match=message):
                lib.get_peft_model(llama(**base), getattr(lib, config)(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {**LORA, "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}, "ensure_weight_tying": True},
        {**TIED["embedding"], "use_dora": True},
        {**TIED["embedding"], "init_lora_weights": "pissa"},
        {"method": "Lora", "target_modules": ["lm_head"], "trainable_token_indices": [1, 3]},
    ],
)
def test_refused(fields):
    model = llama()
    before = list(model.state_dict())
    with pytest.raises(PeftError):
        adapted(minipeft, **fields, base=model)
    assert list(model.state_dict()) == before


def test_tied_names():
    assert tied_names(llama()) == ["lm_head"] and tied_names(llama(tied=False)) == []
    assert input_embedding(llama())[0] == "model.embed_tokens" and input_embedding(nn.Linear(2, 2)) == (None, None)
    for case in TIED:
        assert tied_names(adapted(minipeft, **TIED[case]).get_base_model()) == ["lm_head"], case
    model = transformers.T5Model(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    parts = {name for name, m in model.named_modules() if getattr(m, "weight", None) is model.shared.weight}
    assert set(tied_names(model)) == parts - {"shared"}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "shared"], "ensure_weight_tying": True},
        {"target_modules": ["q"], "modules_to_save": ["shared"], "ensure_weight_tying": True},
        {"target_modules": ["q"], "trainable_token_indices": [1, 4]},
    ],
)
def test_several_tied_layers(fields):
    """T5: two embeddings and the head are tied to one embedding."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = adapted(minipeft, "Lora", transformers.T5ForConditionalGeneration(config).eval(), **fields)
    batch = {"input_ids": X, "decoder_input_ids": X + 2}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, want, rtol=0, atol=1e-5)
    embeddings = [part.embed_tokens for part in (merged.encoder, merged.decoder)]
    assert {m.weight for m in (merged.lm_head, *embeddings)} == {merged.shared.weight}


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_beside_an_adapter_that_has_none(tied):
    model = adapted(minipeft, base=llama(tied), **LORA, trainable_token_indices=[1, 3])
    alone = run(model)
    model.add_adapter("other", minipeft.LoraConfig(target_modules=["v_proj"]))  # does nothing as yet
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        torch.testing.assert_close(run(model), alone)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.merge_adapter()
        torch.testing.assert_close(run(model), alone)
        model.unmerge_adapter()


def test_tokens_beside_a_head_that_is_trained_in_full():
    fields = {**LORA, "trainable_token_indices": [1, 3], "modules_to_save": ["lm_head"]}
    model = adapted(minipeft, **fields)
    config = {field: value for field, value in fields.items() if field != "method"}
    want, before = run(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(PeftError, match="lm_head"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("other", minipeft.LoraConfig(**{**config, "modules_to_save": None}))
    assert list(model.state_dict()) == list(before)
    model.add_adapter("other", minipeft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.copy_(before[name.replace(".other", ".default")])
    torch.testing.assert_close(run(model), want)
    model.set_adapter("other")
    torch.testing.assert_close(run(model), want)
    again = adapted(minipeft, base=llama(), **fields)
    minipeft.set_peft_model_state_dict(again, minipeft.get_peft_model_state_dict(model, adapter_name="other"))
    torch.testing.assert_close(run(again), want)


def test_rows_by_a_name_that_means_the_embedding_and_layers_tied_to_it():
    """All of them are trained, as one: "embed_tokens" of an encoder and of a decoder."""
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}

    class Composite(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.BartConfig(vocab_size=20, d_model=8, **small, **heads)
            self.m1 = transformers.BartModel(self.config)

        def get_input_embeddings(self):
            return self.m1.encoder.embed_tokens

    for name in ("embed_tokens", "encoder.embed_tokens"):
        fields = {"target_modules": ["q_proj"], "trainable_token_indices": {name: [1, 3]}}
        model = adapted(minipeft, "Lora", Composite(), **fields, ensure_weight_tying=True)
        parts = model.base_model.model.m1
        wrapped = [parts.shared, parts.encoder.embed_tokens, parts.decoder.embed_tokens]
        rows = [wrapper.token_adapter.trainable_tokens_delta["default"] for wrapper in wrapped]
        assert all(row is rows[0] for row in rows) and rows[0].requires_grad
        assert sum("trainable_tokens" in key for key in minipeft.get_peft_model_state_dict(model)) == 1
