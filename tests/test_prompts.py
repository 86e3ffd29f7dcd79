"""Prompts on plain modules: the protocol of minipeft/prompt.py, its laws, and what it refuses."""

import copy
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import minipeft
from conformance import models
from conformance.models import language_models
from minipeft.core.errors import (
    AdapterNameError,
    BatchError,
    CheckpointError,
    ConfigError,
    PeftError,
    PeftWarning,
    UnsupportedFeatureError,
)
from minipeft.methods.prompts.multitask_prompt_tuning import MultitaskPromptEmbedding

VOCAB, DIM, HEADS, LAYERS = 20, 8, 2, 3
BASE = {"vocab": VOCAB, "hidden": DIM, "heads": HEADS, "depth": LAYERS, "positions": 40}


Decoder = partial(language_models.CausalLM, BASE)
EncoderDecoder = partial(language_models.EncoderDecoder, BASE)
ENCODERS = {task: partial(language_models.Encoder, {**BASE, "task": task})
            for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")}


class Classifier(nn.Module):
    """An encoder with a head. It does not take a cache itself; its backbone does. Its config is a plain dict."""

    config = {"num_hidden_layers": LAYERS, "hidden_size": DIM, "num_attention_heads": HEADS, "vocab_size": VOCAB}
    num_labels = 3

    def __init__(self):
        super().__init__()
        self.encoder = language_models.Stack(BASE)
        self.dropout, self.classifier = nn.Dropout(0.0), nn.Linear(DIM, 3)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None):
        x, _ = self.encoder(input_ids, attention_mask, inputs_embeds)
        logits = self.classifier(self.dropout(x))
        loss = None if labels is None else F.cross_entropy(logits.view(-1, 3), labels.view(-1))
        return {"loss": loss, "logits": logits}


def fresh(kind):
    torch.manual_seed(3)
    return kind().eval()


def ids(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


CONFIGS = {
    "prompt": lambda **k: minipeft.PromptTuningConfig(num_virtual_tokens=4, **k),
    "vocab": lambda **k: minipeft.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB", **k),
    "mlp": lambda **k: minipeft.PromptEncoderConfig(num_virtual_tokens=4, **k),
    "lstm": lambda **k: minipeft.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=5, **k),
    "multitask": lambda **k: minipeft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2, **k),
    "cpt": lambda **k: minipeft.CPTConfig(cpt_token_ids=[4, 5, 6, 7], cpt_tokens_type_mask=[1, 2, 3, 4], **k),
    "prefix": lambda **k: minipeft.PrefixTuningConfig(num_virtual_tokens=4, **k),
    "projected": lambda **k: minipeft.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=5, **k),
    "cartridge": lambda **k: minipeft.CartridgeConfig(num_virtual_tokens=4, **k),
}
CACHES = ("prefix", "projected", "cartridge")
ENCODED = ("mlp", "lstm", "projected")  # saved without the network that makes them
each = pytest.mark.parametrize("method", CONFIGS)
everywhere = pytest.mark.parametrize("method", [m for m in CONFIGS if m != "cpt"])  # CPT is for CAUSAL_LM only


def adapted(method, kind=Decoder, task="CAUSAL_LM", name="default", **options):
    model = minipeft.get_peft_model(fresh(kind), CONFIGS[method](task_type=task, **options), name).eval()
    return moved(model)


def moved(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def tasks(method, count=2):
    return {"task_ids": torch.arange(count) % 3} if method == "multitask" else {}


@each
def test_a_decoder_sees_what_is_joined_by_hand(method):
    model, x = adapted(method), ids(2, 5)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    got = model(input_ids=x, attention_mask=mask, **tasks(method)).logits
    base, virtual = model.get_base_model(), model.get_prompt(2, **tasks(method))
    full = torch.cat([torch.ones(2, 4, dtype=torch.long), mask], 1)
    if method in CACHES:
        assert len(virtual) == LAYERS and virtual[0][0].shape == (2, HEADS, 4, DIM // HEADS)
        want = base(input_ids=x, attention_mask=full, past_key_values=virtual).logits
    else:
        assert virtual.shape == (2, 4, DIM)
        joined = torch.cat([virtual, base.embed_tokens(x)], 1)
        want = base(inputs_embeds=joined, attention_mask=full).logits
    assert torch.equal(got, want)
    assert not torch.allclose(got[:, -5:], base(input_ids=x, attention_mask=mask).logits, atol=1e-3)


@each
def test_labels_of_virtual_tokens_do_not_count(method):
    model, x = adapted(method), ids(2, 5)
    output = model(input_ids=x, labels=x, **tasks(method))
    logits = output.logits[:, -5:]
    logits = output.logits[:, 3:] if method not in CACHES else logits  # the last virtual token predicts the first
    labels = x if method not in CACHES else x[:, 1:]
    if method == "cpt":  # the label among the examples counts too: token 7 in place 3, predicted from place 2
        logits, labels = output.logits[:, 2:], torch.cat([torch.full((2, 1), 7), x], 1)
    want = F.cross_entropy(logits[:, : labels.shape[1]].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, want)


@each
def test_only_the_prompt_is_trained(method):
    model, x = adapted(method), ids(2, 5)
    before = {k: v.clone() for k, v in model.get_base_model().state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    assert all(n.startswith("prompt_encoder.") for n, p in model.named_parameters() if p.requires_grad)
    model.train()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x, **tasks(method)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.get_base_model().state_dict().items())


@each
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_one_forward_after_the_other(method, use_cache):
    model, x = adapted(method), ids(2, 5)
    got = model.generate(input_ids=x, max_new_tokens=4, use_cache=use_cache, **tasks(method))
    for _ in range(4):
        with torch.no_grad():
            x = torch.cat([x, model(input_ids=x, **tasks(method)).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, x)
    assert "prepare_inputs_for_generation" not in vars(model.get_base_model())


@each
def test_disabled_is_the_base_model(method):
    model, x = adapted(method), ids(2, 5)
    base = fresh(Decoder)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=x, **tasks(method)).logits, base(input_ids=x).logits)
        assert torch.equal(model.generate(input_ids=x), base.generate(x))
    assert not torch.allclose(model(input_ids=x, **tasks(method)).logits[:, -5:], base(input_ids=x).logits)


@everywhere
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_classifier_trains_its_head_too(method, task):
    kind = Classifier if task == "TOKEN_CLS" else PooledClassifier
    model, x = adapted(method, kind, task), ids(2, 5)
    labels = x % 3 if task == "TOKEN_CLS" else torch.tensor([0, 2])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "base_model.classifier.modules_to_save.default.weight" in names
    assert model.cls_layer_name == "classifier"
    output = model(input_ids=x, labels=labels, **tasks(method))
    output["loss"].backward()
    assert model.base_model.classifier.modules_to_save["default"].weight.grad.abs().sum() > 0
    logits = output["logits"][:, -5:] if task == "TOKEN_CLS" else output["logits"]
    torch.testing.assert_close(output["loss"], F.cross_entropy(logits.reshape(-1, 3), labels.view(-1)))
    with model.disable_adapter():
        base = fresh(kind)
        assert torch.equal(model(input_ids=x)["logits"], base(input_ids=x)["logits"])


class PooledClassifier(Classifier):
    """One label for a sequence, read from the mean; its backbone returns a pooled state as the second output."""

    def __init__(self):
        super().__init__()
        inner = self.encoder.forward

        def pooled(input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None):
            x, _ = inner(input_ids, attention_mask, inputs_embeds, past_key_values)
            return x, x.mean(1)

        self.encoder.forward = pooled

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None):
        logits = self.classifier(self.encoder(input_ids, attention_mask, inputs_embeds)[1])
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


@everywhere
@pytest.mark.parametrize("task", ENCODERS)
def test_an_encoder_sees_what_is_joined_by_hand(method, task):
    model, x = adapted(method, ENCODERS[task], task), ids(2, 5)
    mask = torch.ones_like(x)
    mask[0, 3:] = 0
    targets = {"SEQ_CLS": {"labels": torch.tensor([2, 0])}, "TOKEN_CLS": {"labels": x % 3}, "FEATURE_EXTRACTION": {},
               "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([4, 2])}}[task]
    got = model(input_ids=x, attention_mask=mask, **targets, **tasks(method))
    base, virtual = model.get_base_model(), model.get_prompt(2, **tasks(method))
    full = torch.cat([torch.ones(2, 4, dtype=torch.long), mask], 1)
    if method in CACHES:
        want = base(input_ids=x, attention_mask=full, past_key_values=virtual, **targets)
    else:
        joined = torch.cat([virtual, base.get_input_embeddings()(x)], 1)
        if task == "TOKEN_CLS":
            targets = {"labels": torch.cat([torch.full((2, 4), -100), x % 3], 1)}
        want = base(inputs_embeds=joined, attention_mask=full, **targets)
    assert torch.equal(models.answer(got), models.answer(want))
    assert getattr(got, "loss", None) == getattr(want, "loss", None)
    plain = models.answer(fresh(ENCODERS[task])(input_ids=x, attention_mask=mask))
    with model.disable_adapter():
        assert torch.equal(models.answer(model(input_ids=x, attention_mask=mask)), plain)
    seen = models.answer(got) if task == "SEQ_CLS" else models.answer(got)[:, -5:]
    assert not torch.allclose(seen, plain, atol=1e-3)


@pytest.mark.parametrize("method", [m for m in CONFIGS if m not in ("cpt", "multitask")])
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_encoder_decoder_generates_as_it_runs(method, use_cache):
    model, x = adapted(method, EncoderDecoder, "SEQ_2_SEQ_LM"), ids(2, 5)
    mask, y = torch.ones_like(x), torch.ones(2, 1, dtype=torch.long)
    mask[0, 4:] = 0
    got = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=4, use_cache=use_cache)
    for _ in range(4):
        with torch.no_grad():
            logits = model(input_ids=x, attention_mask=mask, decoder_input_ids=y).logits
        y = torch.cat([y, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, y)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=x), fresh(EncoderDecoder).generate(x))


@everywhere
def test_an_encoder_decoder_sees_what_is_joined_by_hand(method):
    model, x, y = adapted(method, EncoderDecoder, "SEQ_2_SEQ_LM"), ids(2, 5), ids(2, 3, seed=1)
    mask, later = torch.ones_like(x), torch.ones_like(y)
    mask[0, 4:] = 0
    got = model(input_ids=x, attention_mask=mask, decoder_input_ids=y, decoder_attention_mask=later, labels=y,
                **tasks(method))
    base, virtual, more = model.get_base_model(), model.get_prompt(2, **tasks(method)), torch.ones(2, 4)
    if method in CACHES:
        want = base(input_ids=x, attention_mask=mask, decoder_input_ids=y, past_key_values=virtual,
                    decoder_attention_mask=torch.cat([more, later], 1)).logits
    else:
        assert virtual.shape == (2, 8, DIM)
        first = torch.cat([virtual[:, :4], base.embed_tokens(x)], 1)
        then = {"decoder_input_ids": y, "decoder_attention_mask": later}
        if method == "multitask":
            then = {"decoder_inputs_embeds": torch.cat([virtual[:, 4:], base.embed_tokens(y)], 1),
                    "decoder_attention_mask": torch.cat([more, later], 1)}
        want = base(inputs_embeds=first, attention_mask=torch.cat([more, mask], 1), **then).logits
    assert torch.equal(got.logits, want)
    torch.testing.assert_close(got.loss, F.cross_entropy(want[:, -3:].flatten(0, 1), y.flatten()))


@each
def test_saved_and_loaded(method, tmp_path):
    model, x = adapted(method), ids(2, 5)
    model.save_pretrained(str(tmp_path))
    loaded = minipeft.PeftModel.from_pretrained(fresh(Decoder), str(tmp_path))
    assert type(loaded) is minipeft.PeftModelForCausalLM
    want = model(input_ids=x, **tasks(method)).logits
    torch.testing.assert_close(loaded(input_ids=x, **tasks(method)).logits, want)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(stored["prompt_embeddings"], model.get_prompt_embedding_to_save("default"))
    model.load_adapter(str(tmp_path), "again")
    model.set_adapter("again")
    torch.testing.assert_close(model(input_ids=x, **tasks(method)).logits, want)
    for copied in (copy.deepcopy(loaded),):
        assert torch.equal(copied(input_ids=x, **tasks(method)).logits, loaded(input_ids=x, **tasks(method)).logits)


@each
def test_each_sample_has_its_own_prompt(method):
    model, x = adapted(method), ids(3, 5)
    model.add_adapter("other", CONFIGS[method](task_type="CAUSAL_LM"))
    torch.manual_seed(8)
    with torch.no_grad():
        for p in model.prompt_encoder["other"].parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.eval()
    got = model(input_ids=x, adapter_names=["other", "default", "other"], **tasks(method, 3)).logits
    for row, name in enumerate(["other", "default", "other"]):
        model.set_adapter(name)
        torch.testing.assert_close(got[row], model(input_ids=x, **tasks(method, 3)).logits[row])
    model.set_adapter("default")
    tokens = model.generate(input_ids=x, adapter_names=["other", "default", "other"], **tasks(method, 3))
    assert torch.equal(tokens[1], model.generate(input_ids=x, **tasks(method, 3))[1])
    for names in (["default"] * 2, ["default", "__base__", "other"], ["default", "other", "third"]):
        with pytest.raises(BatchError):
            model(input_ids=x, adapter_names=names, **tasks(method, 3))


def test_adapters_come_and_go():
    for training in (True, False):
        begun = minipeft.get_peft_model(fresh(Decoder).train(training), CONFIGS["lstm"](task_type="CAUSAL_LM"))
        assert {module.training for module in begun.modules()} == {training}
    model, x = adapted("prompt"), ids(2, 5)
    first = model(input_ids=x).logits
    model.add_adapter("other", CONFIGS["prompt"](task_type="CAUSAL_LM"))
    with pytest.raises(AdapterNameError):
        model.add_adapter("other", CONFIGS["prompt"](task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError):
        model.add_adapter("third", CONFIGS["prefix"](task_type="CAUSAL_LM"))
    model.set_adapter("other")
    with pytest.warns(PeftWarning, match="default"):
        model.delete_adapter("other")
    assert model.active_adapter == "default" and torch.equal(model(input_ids=x).logits, first)
    model.delete_adapter("default")
    assert model.active_adapters == [] and not model.prompt_encoder
    assert torch.equal(model(input_ids=x).logits, fresh(Decoder)(input_ids=x).logits)


# ------------------------------------------------------------------------------------------------------ single methods
def test_prompts_begin_where_they_are_told():
    words = fresh(Decoder).embed_tokens.weight
    for method, rows in (("vocab", None), ("cpt", [4, 5, 6, 7])):
        model = minipeft.get_peft_model(fresh(Decoder), CONFIGS[method](task_type="CAUSAL_LM"))
        begun = model.get_prompt_embedding_to_save("default")
        assert all(any(torch.equal(row, word) for word in words) for row in begun)
        assert rows is None or torch.equal(begun, words[rows])
    zero = minipeft.get_peft_model(fresh(Decoder), minipeft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero"))
    assert not zero.get_prompt_embedding_to_save("default").any()


@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_begins_with_a_trained_prompt(how, tmp_path):
    source = adapted("multitask")
    source.save_pretrained(str(tmp_path))
    path = str(tmp_path / "adapter_model.safetensors")
    trained = safetensors.torch.load_file(path)

    def config(**k):
        return minipeft.MultitaskPromptTuningConfig(
            **{"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_ranks": 2, "prompt_tuning_init": how,
               "prompt_tuning_init_state_dict_path": path, "prompt_tuning_init_task": 2, **k})

    prompt = minipeft.get_peft_model(fresh(Decoder), config()).prompt_encoder["default"]
    assert isinstance(prompt, MultitaskPromptEmbedding)
    assert torch.equal(prompt.embedding.weight, trained["prompt_embeddings"])
    for key in ("prefix_task_cols", "prefix_task_rows"):
        of_tasks = {"AVERAGE_SOURCE_TASKS": trained[key].mean(0, keepdim=True), "EXACT_SOURCE_TASK": trained[key][2:]}
        if how in of_tasks:
            assert torch.equal(getattr(prompt, key), of_tasks[how])
    wrong = [config(prompt_tuning_init_state_dict_path=None), config(num_virtual_tokens=3)]
    wrong += [config(prompt_tuning_init_task=3)] if how == "EXACT_SOURCE_TASK" else []
    for bad in wrong:
        base = fresh(Decoder)
        with pytest.raises((ConfigError, CheckpointError)):
            minipeft.get_peft_model(base, bad)
        assert all(p.requires_grad for p in base.parameters())


def test_cpt_bounds_its_change_and_leaves_labels_alone():
    model, x = adapted("cpt"), ids(2, 5)
    prompt = model.prompt_encoder["default"]
    with torch.no_grad():
        prompt.delta_embedding.weight.fill_(1.0)
    before = prompt.delta_embedding.weight.clone()
    bound = 0.1 * math.sqrt(DIM / 2048)
    norms = prompt.get_projection().norm(dim=1)
    torch.testing.assert_close(norms[:3], torch.full((3,), bound))
    assert norms[3] < 1e-9
    model(input_ids=x, labels=x).loss.backward()
    assert torch.equal(prompt.delta_embedding.weight, before), "running in eval mode changes nothing"
    assert not prompt.delta_embedding.weight.grad[3].any() and prompt.delta_embedding.weight.grad[:3].all()
    model.train()(input_ids=x)
    assert torch.equal(prompt.delta_embedding.weight, prompt.get_projection())
    mask = torch.full_like(x, 4)
    model(input_ids=x, labels=x, input_type_mask=mask)
    assert (mask == 4).all(), "the caller's tensor is left as it was"
    with pytest.raises(BatchError):
        model(input_ids=x, labels=x, input_type_mask=mask[:, 1:])


def test_cpt_counts_far_examples_less():
    config = CONFIGS["cpt"](task_type="CAUSAL_LM", opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    logits, labels = torch.randn(1, 4, VOCAB), torch.tensor([[-100, 3, -100, 5]])
    output = SimpleNamespace(logits=logits, loss=None)
    got = minipeft.CPTEmbedding.calculate_loss(output, labels, torch.tensor([[1, 4, 5, 8]]), config).loss
    losses = F.cross_entropy(logits[0, [0, 2]], labels[0, [1, 3]], reduction="none")
    torch.testing.assert_close(got, (0.5 * losses[0] + losses[1]) / 2)


def test_a_cartridge_of_a_text_stands_for_the_text():
    model = adapted("cartridge", num_frozen_tokens=2)
    base, text, x = model.get_base_model(), ids(1, 6, seed=4), ids(2, 5)
    cache = base(input_ids=text).past_key_values
    loaded = minipeft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert torch.equal(loaded, minipeft.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4))
    want = base(input_ids=torch.cat([text[:, :4].expand(2, -1), x], 1)).logits[:, 4:]
    torch.testing.assert_close(model(input_ids=x).logits, want)
    prompt = model.prompt_encoder["default"]
    assert [p.requires_grad for p in (prompt.frozen_embedding, prompt.trainable_embedding)] == [False, True]

    def tokenizer(text_given, return_tensors, truncation, max_length):
        return {"input_ids": text}

    again = minipeft.initialize_kv_prefix_from_text(model, tokenizer, text="anything")
    torch.testing.assert_close(again, loaded)
    for cache_now, count in ((cache, 7), ((), 1), (tuple((k[:, :1], v) for k, v in cache), 2), ([(1, 2)], 1)):
        with pytest.raises(ValueError):
            minipeft.prompt_embeddings_from_past_key_values(cache_now, num_virtual_tokens=count)
    with pytest.raises(TypeError):
        minipeft.prompt_embeddings_from_past_key_values(7, num_virtual_tokens=1)
    for method in ("prompt", "projected"):
        with pytest.raises(ConfigError):
            minipeft.initialize_kv_prefix_from_past_key_values(adapted(method), past_key_values=cache)


def test_cartridges_are_composed(tmp_path):
    parts = []
    for i in range(2):
        model = adapted("cartridge")
        with torch.no_grad():
            model.prompt_encoder["default"].trainable_embedding.add_(i)
        model.save_pretrained(str(tmp_path / str(i)))
        parts.append(model.get_prompt_embedding_to_save("default"))
    paths = [tmp_path / "0", tmp_path / "1"]
    minipeft.compose_cartridge_adapters(paths, output_path=tmp_path / "both")
    both = minipeft.PeftModel.from_pretrained(fresh(Decoder), str(tmp_path / "both"))
    assert torch.equal(both.get_prompt_embedding_to_save("default"), torch.cat(parts))
    assert both.active_peft_config.num_virtual_tokens == 8
    assert both.prompt_encoder["default"].num_frozen_tokens == 1
    adapted("prompt").save_pretrained(str(tmp_path / "other"))
    for bad in (paths[:1], [paths[0], tmp_path / "other"]):
        with pytest.raises(ConfigError):
            minipeft.compose_cartridge_adapters(bad, output_path=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_sizes_come_from_the_model_or_from_the_configuration():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = language_models.Stack(BASE, causal=True)

        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None):
            return self.body(input_ids, attention_mask, inputs_embeds, past_key_values)[0]

    torch.manual_seed(0)
    base, x = Bare(), ids(2, 5)
    with pytest.raises(ConfigError, match="num_layers"):
        minipeft.get_peft_model(base, minipeft.PrefixTuningConfig(num_virtual_tokens=4))
    assert all(p.requires_grad for p in base.parameters())
    model = minipeft.get_peft_model(base, minipeft.PrefixTuningConfig(
        num_virtual_tokens=4, num_layers=LAYERS, token_dim=DIM, num_attention_heads=HEADS))
    assert model(input_ids=x).shape == (2, 5, DIM)
    model = minipeft.get_peft_model(Bare(), minipeft.PromptTuningConfig(num_virtual_tokens=4))
    assert model(x).shape == (2, 9, DIM)
    with pytest.raises(UnsupportedFeatureError, match="task_type"):
        model.generate(input_ids=x)
    grouped = fresh(Decoder)
    grouped.config = {**vars(grouped.config), "num_key_value_heads": 1}
    config = CONFIGS["prefix"](task_type="CAUSAL_LM")
    minipeft.get_peft_model(grouped, config)
    assert (config.token_dim, config.num_attention_heads) == (DIM // HEADS, 1)


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("config", [
    lambda: minipeft.PromptTuningConfig(task_type="CAUSAL_LM"),
    lambda: minipeft.PromptTuningConfig(num_virtual_tokens=0, task_type="CAUSAL_LM"),
    lambda: minipeft.PromptTuningConfig(num_virtual_tokens=-1, task_type="CAUSAL_LM"),
    lambda: minipeft.PromptTuningConfig(num_virtual_tokens=2, token_dim=5, task_type="CAUSAL_LM"),
    lambda: minipeft.PromptTuningConfig(num_virtual_tokens=2, num_transformer_submodules=3, task_type="CAUSAL_LM"),
    lambda: minipeft.PrefixTuningConfig(num_virtual_tokens=2, token_dim=7, task_type="CAUSAL_LM"),
    lambda: minipeft.CartridgeConfig(num_frozen_tokens=0, task_type="CAUSAL_LM"),
    lambda: minipeft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[VOCAB]),
], ids=range(8))
def test_configurations_that_do_not_fit_the_model(config):
    base = fresh(Decoder)
    given = config()
    kept = copy.deepcopy(given)
    with pytest.raises(ConfigError):
        minipeft.get_peft_model(base, given)
    assert given == kept and all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("name, fields", [
    ("PromptTuningConfig", {"prompt_tuning_init": "NO"}),
    ("PromptTuningConfig", {"num_virtual_tokens": "8"}),
    ("PromptTuningConfig", {"prompt_tuning_init": "TEXT"}),
    ("PromptTuningConfig", {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"}),
    ("PromptTuningConfig", {"tokenizer_kwargs": {"a": 1}}),
    ("PrefixTuningConfig", {"init_weights": "ones"}),
    ("PromptEncoderConfig", {"encoder_reparameterization_type": "GRU"}),
    ("PromptEncoderConfig", {"encoder_dropout": 1.5}),
    ("MultitaskPromptTuningConfig", {"num_tasks": 0}),
    ("MultitaskPromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    ("CPTConfig", {}),
    ("CPTConfig", {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1]}),
    ("CartridgeConfig", {"num_frozen_tokens": -1}),
    ("CartridgeConfig", {"num_virtual_tokens": 2, "num_frozen_tokens": 3}),
])
def test_configurations_that_cannot_be(name, fields):
    with pytest.raises(PeftError) as raised:
        getattr(minipeft, name)(**fields)
    assert isinstance(raised.value, (ValueError, TypeError))


FAULTS = {
    "missing": lambda t: t.pop("prompt_embeddings"),
    "extra": lambda t: t.update(more=torch.ones(2)),
    "misshapen": lambda t: t.update(prompt_embeddings=torch.ones(3, 3)),
    "not finite": lambda t: t["prompt_embeddings"].view(-1)[0:1].fill_(math.nan),
}


@each
@pytest.mark.parametrize("fault", FAULTS)
def test_checkpoints_that_do_not_fit(method, fault, tmp_path):
    model = adapted(method)
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    FAULTS[fault](tensors)
    safetensors.torch.save_file(tensors, path)
    base = fresh(Decoder)
    with pytest.raises(CheckpointError):
        minipeft.PeftModel.from_pretrained(base, str(tmp_path))
    assert all(p.requires_grad for p in base.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        minipeft.set_peft_model_state_dict(model, tensors)
    with pytest.raises(CheckpointError):
        model.load_adapter(str(tmp_path), "other")
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ENCODED)
def test_what_was_saved_without_its_network_is_not_loaded_into_one(method):
    model = adapted(method)
    with pytest.raises(CheckpointError, match="inference_mode"):
        minipeft.set_peft_model_state_dict(model, minipeft.get_peft_model_state_dict(model))


def test_batches_that_do_not_fit():
    model, x = adapted("prompt"), ids(2, 5)
    with pytest.raises(BatchError, match="input_ids"):
        model()
    with pytest.raises(BatchError, match="attention_mask"):
        model(input_ids=x, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(BatchError, match="training"):
        model.train()(input_ids=x, adapter_names=["default"] * 2)
    model = adapted("multitask")
    for bad in (None, torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(BatchError, match="task_ids"):
            model(input_ids=x, task_ids=bad)
    with pytest.warns(PeftWarning, match="osition"):
        adapted("prompt")(input_ids=x, position_ids=torch.arange(5).expand(2, -1))
    shifted = adapted("prefix")
    got = shifted(input_ids=x, position_ids=torch.arange(5).expand(2, -1)).logits
    torch.testing.assert_close(got, shifted(input_ids=x).logits)


def test_a_prefix_that_cannot_reach_the_model():
    class Plain(nn.Module):
        config = Classifier.config

        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(VOCAB, DIM)

        def forward(self, input_ids=None, inputs_embeds=None):
            return self.tokens(input_ids) if inputs_embeds is None else inputs_embeds

    with pytest.raises(UnsupportedFeatureError, match="past_key_values"):
        minipeft.get_peft_model(Plain(), CONFIGS["prefix"]())
    checkpointing = fresh(Decoder)
    checkpointing.layers.gradient_checkpointing = True
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        minipeft.get_peft_model(checkpointing, CONFIGS["prefix"](task_type="CAUSAL_LM"))


# -------------------------------------------------------------------------------------------------------------- tools
def test_base_weights_under_their_own_names():
    base = fresh(Classifier)
    want = {k: v.clone() for k, v in base.state_dict().items()}
    lora = minipeft.LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj", "v_proj"], bias="none")
    for config in (lora, CONFIGS["prompt"](task_type="TOKEN_CLS")):
        model = minipeft.get_peft_model(fresh(Classifier), config)
        got = minipeft.get_base_model_state_dict(model)
        if config.is_prompt_learning:
            assert any("modules_to_save" in k for k in model.base_model.state_dict())
        assert sorted(got) == sorted(want) and all(torch.equal(got[k], want[k]) for k in want)
        other = {k: v + 1 for k, v in want.items()}
        report = minipeft.set_base_model_state_dict(model, other)
        assert not report.missing_keys and not report.unexpected_keys
        got = minipeft.get_base_model_state_dict(model)
        assert all(torch.equal(got[k], other[k]) for k in want)
        short = {k: v for k, v in want.items() if k != "classifier.bias"} | {"strange": torch.ones(1)}
        with pytest.raises(RuntimeError, match=r"classifier\.bias"):
            minipeft.set_base_model_state_dict(model, short)
        report = minipeft.set_base_model_state_dict(model, short, strict=False)
        assert (report.missing_keys, report.unexpected_keys) == (["classifier.bias"], ["strange"])


def test_precision_tools():
    model = adapted("prompt")
    minipeft.cast_mixed_precision_params(model, torch.bfloat16)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    base = minipeft.prepare_model_for_kbit_training(fresh(Decoder).half())
    assert {(p.dtype, p.requires_grad) for p in base.parameters()} == {(torch.float32, False)}
    ids_now = torch.tensor([[5, 6, -100]])
    assert minipeft.shift_tokens_right(ids_now, 0, 9).tolist() == [[9, 5, 6]]
    assert minipeft.shift_tokens_right(torch.tensor([[-100, 6, 7]]), 0, 9).tolist() == [[9, 0, 6]]
    with pytest.raises(ValueError):
        minipeft.shift_tokens_right(ids_now, None, 9)


def test_plain_modules_need_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, minipeft\n"
        "from tests.test_prompts import adapted, ids\n"
        "for method in ('prompt', 'prefix', 'mlp', 'cartridge'):\n"
        "    adapted(method).generate(input_ids=ids(2, 5))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


class Through(Classifier):
    """A classifier that runs its backbone in another way, `how`."""

    how = staticmethod(lambda run, *args: run(*args))

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None):
        run = lambda ids, mask, embeds, _: self.encoder(ids, mask, embeds)[0]
        x = self.how(run, input_ids, attention_mask, inputs_embeds, self.classifier.weight)
        return {"logits": self.classifier(x)}


def under_a_prefix(how):
    torch.manual_seed(3)
    base = Through()
    base.how = how
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    config = minipeft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = minipeft.get_peft_model(base, config).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backbone_under_gradient_checkpointing_has_the_prefix_again(reentrant):
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    found = []
    for how in (Through.how, again):
        model = under_a_prefix(how)
        model.base_model.classifier.weight.requires_grad_()  # reentrant checkpointing looks for such an argument
        model(input_ids=ids(2, 5), attention_mask=torch.ones(2, 5))["logits"].square().sum().backward()
        found.append(model.prompt_encoder["default"].embedding.weight.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0])


def test_a_backbone_that_runs_twice_begins_with_the_prefix_each_time():
    seen = []
    model = under_a_prefix(lambda run, *args: seen.extend((run(*args), run(*args))) or seen[0])
    model(input_ids=ids(2, 5), attention_mask=torch.ones(2, 5))
    assert torch.equal(*seen)


def test_a_prefix_for_a_backbone_compiles_whole():
    model = under_a_prefix(Through.how)
    given = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5)}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given)["logits"], model(**given)["logits"])
