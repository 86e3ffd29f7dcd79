"""Every method of layers on every family of transformers' models: one row of each method, moved to the family's layers.

One test runs the whole life of an adapter, so that the families cost little: names, loss, logits, gradients, generated
tokens, checkpoints in both directions, and the merged model, each against peft.
"""

import copy
import dataclasses
import functools
import warnings

import pytest
import torch

from . import bases as B
from . import harness as H
from .cases import CASES

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SKIP = {"ln_tuning", "trainable_tokens", "adaption_prompt", "shadow"}  # not on linear layers: rows of their own
ATTENTION = ["q_proj", "v_proj"]
FAMILIES = {  # name: (model, what is adapted: a square layer, one that widens, one that narrows)
    "opt": (B.OPT, [*ATTENTION, "out_proj"]),  # its fc1 sees no samples, which Poly in peft needs
    "llama": (B.LLAMA_GROUPED, [*ATTENTION, "down_proj"]),
    "gpt2": (B.GPT2, ["c_attn", "mlp.c_proj"]),
    "mistral": (B.MISTRAL, [*ATTENTION, "up_proj"]),
    "gemma3": (B.GEMMA3, [*ATTENTION, "down_proj"]),
    "qwen3": (B.QWEN3, [*ATTENTION, "up_proj"]),
    "bert": (B.BERT_SEQ, ["query", "value", "intermediate.dense"]),
    "roberta": (B.ROBERTA, ["query", "value", "intermediate.dense"]),
    "deberta": (B.DEBERTA, ["query_proj", "value_proj", "intermediate.dense"]),
    "t5": (B.T5, ["q", "v", "wo"]),
    "bart": (B.BART, [*ATTENTION, "fc2"]),
    "vit": (B.VIT, [*ATTENTION, "fc1"]),
}
NO_BIAS = ("llama", "mistral", "gemma3", "qwen3", "t5")
METHODS = {}
for case in CASES:
    if "mlp" in case.base.name or case.method in SKIP:
        METHODS.setdefault(case.method, case)
METHODS = {name: case for name, case in METHODS.items() if name not in SKIP}


def on(case, family):
    """The method's row on the family's layers."""
    base, targets = FAMILIES[family]
    kwargs = {**copy.deepcopy(case.kwargs), "target_modules": targets}
    merges = case.merges and not (case.method == "beft" and family in NO_BIAS)  # there is no bias to merge it into
    return dataclasses.replace(case, id=f"{case.method}/{family}", base=base, kwargs=kwargs, merges=merges)


@functools.cache
def built(family):
    return FAMILIES[family][0].build(torch.float32)


def adapted(lib, case, family):
    return H.adapt(lib, case, base=copy.deepcopy(built(family)))


def fresh(lib, family, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lib.PeftModel.from_pretrained(copy.deepcopy(built(family)), str(folder)).eval()


def loss_and_logits(out):
    return {k: v for k, v in out.items() if k in ("loss", "logits")}


def close_gradients(got, want, tolerance):
    """Equal within `tolerance` of the largest gradient of all: float32 has no more to say of the small ones."""
    largest = max(g.abs().max() for g in want.values())
    H.close({k: g / largest + 2 for k, g in got.items()}, {k: g / largest + 2 for k, g in want.items()}, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_life(method, family, lib, ref, is_ref, tmp_path):
    case = on(METHODS[method], family)
    try:
        theirs = adapted(ref, case, family)
    except (TypeError, ValueError, NotImplementedError) as refusal:
        assert family == "gpt2" and "Conv1D" in str(refusal), refusal
        pytest.skip("peft does not adapt Conv1D with this method")
    if family == "gpt2" and method == "osf":
        pytest.skip("peft leaves Conv1D as it is, without a word")
    ours = adapted(lib, case, family)
    H.copy_values(H.move(theirs, case.scale), ours)
    batch, tolerance = H.inputs(case), 5e-5
    want, got = H.run(theirs, batch), H.run(ours, batch)
    H.close(loss_and_logits(got), loss_and_logits(want), tolerance)
    assert "loss" in want
    if "gradients" not in case.disputed:
        close_gradients(H.gradients(ours, batch), H.gradients(theirs, batch), tolerance)
    if family not in ("bert", "roberta", "deberta", "vit"):
        words = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "task_ids")}
        options = {"max_new_tokens": 3, "do_sample": False}
        tokens = [
            (model.base_model if "task_ids" in words else model).generate(**copy.deepcopy(words), **options)
            for model in (ours, theirs)
        ]
        assert torch.equal(*tokens)
    H.saved(ours, tmp_path / "ours")
    H.saved(theirs, tmp_path / "theirs")
    H.close(loss_and_logits(H.run(fresh(ref, family, tmp_path / "ours"), batch)), loss_and_logits(want), tolerance)
    H.close(loss_and_logits(H.run(fresh(lib, family, tmp_path / "theirs"), batch)), loss_and_logits(want), tolerance)
    if case.merges:
        plain = {k: v for k, v in batch.items() if k != "task_ids"}
        merged = H.weighable(case, loss_and_logits(H.run(ours.merge_and_unload(), plain)))
        H.close(merged, H.weighable(case, loss_and_logits(H.run(theirs.merge_and_unload(), plain))), 4 * tolerance)
