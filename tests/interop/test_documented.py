"""The six configurations of PEFT's "Models" page, word for word, on transformers' own classes on the meta device."""

import json
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = json.loads((Path(__file__).parent / "documented_examples.json").read_text())["examples"]
LEGACY = {"postprocess_past_key_value_function", "enable_lora"}  # today's peft raises TypeError for them

BERT = {"vocab_size": 28996, "num_labels": 2}
BASES = {
    "bert-base-cased/SEQ_CLS/prefix": ("BertConfig", BERT, "BertForSequenceClassification"),
    "bert-base-cased/TOKEN_CLS/prefix": ("BertConfig", BERT, "BertForTokenClassification"),
    "gpt2-large/CAUSAL_LM/prefix": (
        "GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, "GPT2LMHeadModel"),
    "t5-base/SEQ_2_SEQ_LM/lora": (
        "T5Config", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, "T5ForConditionalGeneration"),
    "bert-base-cased/QUESTION_ANS/lora": ("BertConfig", BERT, "BertForQuestionAnswering"),
    "bert-base-cased/FEATURE_EXTRACTION/lora": ("BertConfig", BERT, "BertModel"),
}
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=[e["id"] for e in EXAMPLES])


def base_of(example):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no model to adapt")
    config, options, model = BASES[example["id"]]
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**options))


def counts(module, example, config):
    model = module.get_peft_model(base_of(example), config)
    return type(model).__name__, model.get_nb_trainable_parameters(), model


@each_example
def test_counts(example, lib, is_ref, capsys):
    written = {k: v for k, v in example["config"].items() if not (is_ref and k in LEGACY)}
    if is_ref or not LEGACY & set(written):
        config = lib.get_peft_config(dict(written))
    else:
        with pytest.warns(UserWarning, match="|".join(LEGACY)):
            config = lib.get_peft_config(dict(written))
    name, (trainable, total), model = counts(lib, example, config)
    wanted = example["peft_0.21.2"]
    assert (name, trainable, total) == (example["class"], wanted["trainable"], wanted["all"])
    assert next(p for n, p in model.named_parameters() if n.startswith("base_model")).is_meta
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n")


@each_example
def test_peft_agrees(example, lib, ref):
    """The recorded counts are those of the installed peft; names of all parameters are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [counts(m, example, m.get_peft_config({k: v for k, v in example["config"].items() if k not in LEGACY}))
                  for m in (ref, lib)]
    theirs, ours = models
    assert theirs[:2] == ours[:2]
    described = [{n: (tuple(p.shape), p.requires_grad) for n, p in m[2].named_parameters()} for m in models]
    assert described[1] == described[0]


@pytest.mark.parametrize("key", sorted(LEGACY))
def test_the_reference_rejects_legacy_keys(key, ref):
    with pytest.raises(TypeError):
        ref.get_peft_config({"peft_type": "LORA", key: None})
