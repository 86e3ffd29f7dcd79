"""aLoRA: where the invocation sequence is found, and what runs from there on."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import bases as B
from . import harness as H

TOKENS = {"default": [5, 6], "other": [7], "plain": None}
IDS = torch.tensor([
    [3, 5, 6, 9, 5, 6, 8, 7, 4],  # twice, and that of "other"
    [3, 4, 5, 9, 5, 8, 8, 7, 4],  # never in full
    [5, 6, 5, 9, 5, 8, 8, 7, 4],  # first of all
    [4, 9, 3, 9, 5, 8, 7, 5, 6],  # last of all
])
MASK = torch.ones_like(IDS)
BEGINS = {"default": [4, None, 0, 7], "other": [7, 7, 7, 6]}  # the first token that differs
MIXED = ["default", "other", "__base__", "plain"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True,
          "output_logits": True}
TOLERANCE = 2e-6  # of float64: Llama's norms and angles are float32 inside, as `Base.float32_inside` says of it


def adapted(lib, base=None, task_type="CAUSAL_LM", targets=("q_proj", "down_proj"), all_tokens=TOKENS, **fields):
    """A decoder with an adapter for each of `all_tokens` (three, two of them aLoRA), all moved; in float64."""
    if base is None:
        base = B.LLAMA.build()
    model = None
    H.seed(0)
    for name, tokens in all_tokens.items():
        config = lib.LoraConfig(task_type=task_type, target_modules=list(targets), r=3,
                                alora_invocation_tokens=tokens, **fields)
        if model is None:
            model = lib.get_peft_model(base, config)
        else:
            model.add_adapter(name, config)
    return H.move(model, 0.3, only=lambda name, p: "lora_" in name).double().eval()


@pytest.fixture(scope="module")
def both(ref, lib):
    return adapted(ref), adapted(lib)


@torch.no_grad()
def logits(model, **inputs):
    return model(**{"input_ids": IDS, "attention_mask": MASK, **inputs}).logits


def same(got, want, tolerance=TOLERANCE):
    H.close({"logits": got}, {"logits": want}, tolerance)


def changed_from(a, b):
    """The first token of each sample that differs, or None."""
    rows = (a - b).abs().amax(-1) > 1e-5
    return [int(row.nonzero()[0]) if row.any() else None for row in rows]


@pytest.mark.parametrize("name", ["default", "other"])
def test_begins_with_the_last_invocation(both, name):
    theirs, ours = both
    for model in both:
        model.set_adapter(name)
    got = logits(ours)
    with ours.disable_adapter():
        assert changed_from(got, logits(ours)) == BEGINS[name]
    same(got, logits(theirs))
    for model in both:
        model.set_adapter("default")


@pytest.mark.parametrize("offsets", [[1, None, 20, 3], [0, 2, 3, 9]], ids=str)
def test_given_offsets(both, offsets):
    theirs, ours = both
    got = logits(ours, alora_offsets=offsets)
    same(got, logits(theirs, alora_offsets=offsets))
    with ours.disable_adapter():
        assert changed_from(got, logits(ours)) == [max(9 - o, 0) if o else None for o in offsets]


def test_short_input(both):
    theirs, ours = both
    same(logits(ours, input_ids=IDS[:, :1], attention_mask=None),
         logits(theirs, input_ids=IDS[:, :1], attention_mask=None))


def test_mixed_batch(both):
    theirs, ours = both
    got = logits(ours, adapter_names=MIXED)
    same(got, logits(theirs, adapter_names=MIXED))
    for row, name in enumerate(MIXED):
        alone = {"input_ids": IDS[row:row + 1], "attention_mask": MASK[row:row + 1]}
        same(got[row:row + 1], logits(ours, adapter_names=[name], **alone))


@pytest.mark.parametrize("names", [None, MIXED], ids=["one", "mixed"])
def test_generates_as_peft(both, names):
    theirs, ours = both
    more = {} if names is None else {"adapter_names": names}
    out = [m.generate(input_ids=IDS, attention_mask=MASK, **GREEDY, **more) for m in (ours, theirs)]
    assert torch.equal(out[0].sequences, out[1].sequences)
    same(torch.stack(out[0].logits), torch.stack(out[1].logits))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
def test_generates_the_same_whatever_is_cached(lib, is_ref, both, options):
    if is_ref:
        pytest.skip("disputed: without a cache, or in chunks, peft counts the offsets from the wrong end")
    ours = both[1]
    want, got = (ours.generate(input_ids=IDS, attention_mask=MASK, **GREEDY, **o) for o in ({}, options))
    same(torch.stack(got.logits), torch.stack(want.logits))


@pytest.mark.parametrize("name", ["default", "other"])
def test_padding_on_the_left(both, name):
    short, options = IDS[:, 3:], {**GREEDY, "pad_token_id": 0}
    padded = torch.cat([torch.zeros(4, 2, dtype=torch.long), short], 1)
    outs = []
    for model in (copy.deepcopy(m).float() for m in both):
        model.set_adapter(name)
        for ids in (short, padded):
            out = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)
            outs.append({"logits": torch.stack(out.logits)})
    for out in outs[1:]:
        H.close(out, outs[0], 1e-4)


def test_peft_counts_from_the_wrong_end(ref):
    theirs = adapted(ref)
    out = [theirs.generate(input_ids=IDS, attention_mask=MASK, **GREEDY, use_cache=c) for c in (True, False)]
    assert not torch.allclose(torch.stack(out[0].logits), torch.stack(out[1].logits))


@pytest.mark.parametrize("names", [None, MIXED], ids=["one", "mixed"])
def test_beams(lib, is_ref, both, names):
    """The score of the best beam is what a forward pass over its tokens says."""
    if is_ref:
        pytest.skip("peft refuses beam search: test_peft_refuses_beams")
    ours = both[1]
    more = {} if names is None else {"adapter_names": names}
    out = ours.generate(input_ids=IDS, attention_mask=MASK, num_beams=2, **{**GREEDY, "output_scores": True}, **more)
    ids, length = out.sequences, IDS.shape[1]
    mask = torch.cat([MASK, torch.ones_like(ids[:, length:])], 1)
    offsets = [ids.shape[1] - b if b is not None else None for b in begins(names)]
    log_p = logits(ours, input_ids=ids, attention_mask=mask, alora_offsets=offsets, **more)
    log_p = log_p[:, length - 1:-1].log_softmax(-1).gather(-1, ids[:, length:, None]).squeeze(-1)
    H.close({"score": log_p.mean(1).float()}, {"score": out.sequences_scores}, 1e-5)


def begins(names):
    return BEGINS["default"] if names is None else [BEGINS.get(n, [None] * 4)[row] for row, n in enumerate(names)]


def test_peft_refuses_beams(ref):
    with pytest.raises(ValueError, match="Beam"):
        adapted(ref).generate(input_ids=IDS, num_beams=2, max_new_tokens=1)


def test_nothing_invoked_is_the_base_model_with_zero_gradients(both):
    ours, ids = both[1], IDS[1:2]
    for model in both:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(grads) == 8 and all(g is not None and not g.any() for g in grads)
    with ours.disable_adapter():
        want = logits(ours)[1:2]
    H.identical({"y": logits(ours)[1:2]}, {"y": want})


def test_gradients_equal(both):
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    got, want = (H.gradients(model, batch) for model in reversed(both))
    H.close(got, want, TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True], ids=["reentrant=False", "reentrant=True"])
def test_gradient_checkpointing(lib, ref, is_ref, both, reentrant):
    """Recomputed blocks know their own pass, also when another came in between; there peft raises."""
    models = [copy.deepcopy(m).train() for m in both]
    batches = [{"input_ids": ids, "labels": ids} for ids in (IDS, IDS.flip(0))]

    def backward(model, batches):
        model.zero_grad()
        sum(model(**batch).loss * (i + 1) for i, batch in enumerate(batches)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    want = [backward(models[1], batches[:n]) for n in (1, 2)]
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    H.close(backward(models[1], batches[:1]), want[0], TOLERANCE)
    H.close(backward(models[0], batches[:1]), want[0], TOLERANCE)
    if not is_ref:
        H.close(backward(models[1], batches), want[1], TOLERANCE)
    with pytest.raises(ValueError, match="Multiple invocations"):
        backward(models[0], batches)


@pytest.mark.parametrize("direction", ["from peft", "to peft"])
def test_checkpoints(both, lib, ref, tmp_path, direction):
    theirs, ours = both
    source, module = (theirs, lib) if direction == "from peft" else (ours, ref)
    source.save_pretrained(str(tmp_path))
    loaded = module.PeftModel.from_pretrained(B.LLAMA.build(), str(tmp_path)).double()
    assert loaded.peft_config["default"].alora_invocation_tokens == [5, 6]
    H.close({"y": logits(loaded)}, {"y": logits(source)}, 1e-6)  # saved in float64, loaded into float32
    with loaded.disable_adapter():
        assert changed_from(logits(source), logits(loaded)) == BEGINS["default"]


def test_each_active_adapter_has_its_own_sequence(lib, is_ref, both):
    if is_ref:
        pytest.skip("disputed: peft takes the sequence of one adapter for all")
    ours = both[1]
    ours.base_model.set_adapter(["default", "other"])
    got = logits(ours)
    ours.base_model.set_adapter("default")
    with ours.disable_adapter():
        base = logits(ours)
    first = [min(b for b in pair if b is not None) for pair in zip(BEGINS["default"], BEGINS["other"])]
    assert changed_from(got, base) == first


class Config:
    model_type = "custom"

    def to_dict(self):
        return {"model_type": self.model_type}

    def get(self, key, default=None):
        return self.to_dict().get(key, default)


class Decoder(nn.Module):
    """What PEFT needs of a decoder that is not of transformers."""

    def __init__(self, again=False):
        super().__init__()
        self.embed, self.inner = nn.Embedding(40, 8), nn.Linear(8, 12)
        self.head, self.again = nn.Linear(12, 40), again
        self.config = Config()

    def prepare_inputs_for_generation(self, **kwargs):
        return kwargs

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **unused):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        h = checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)
        return self.head(torch.tanh(h))


def plain(lib, again=False, task_type="CAUSAL_LM"):
    torch.manual_seed(0)
    return adapted(lib, Decoder(again), task_type, ["inner"])


def test_plain_module(lib, ref, is_ref):
    theirs, ours = plain(ref), plain(lib)
    with torch.no_grad():
        got = ours(input_ids=IDS)
        with ours.disable_adapter():
            base = ours(input_ids=IDS)
        assert changed_from(got, base) == BEGINS["default"]
        same(got, theirs(input_ids=IDS), 1e-10)
        same(ours(IDS), got, 1e-10)
        if not is_ref:  # there the tuner itself does not search
            same(ours.base_model(IDS), got, 1e-10)


def test_plain_module_of_no_task(lib, ref):
    """Nothing is searched for, in neither; offsets may be given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (plain(module, task_type=None) for module in (ref, lib))
    for given in ({}, {"alora_offsets": [2, None, 1, 9]}):
        with torch.no_grad():
            got, want = ours(input_ids=IDS, **given), theirs(input_ids=IDS, **given)
        same(got, want, 1e-10)
        with ours.disable_adapter(), torch.no_grad():
            assert any(changed_from(got, ours(input_ids=IDS))) is bool(given)


def test_checkpointing_of_another_kind(lib, is_ref):
    if is_ref:
        pytest.skip("peft forgets the offsets there")
    grads = []
    for again in (False, True):
        ours = H.move(plain(lib, again)).train()
        one, two = ours(input_ids=IDS), ours(input_ids=IDS.flip(0))  # the second before the first's gradients
        one.cos().sum().backward()
        two.sin().sum().backward()
        grads.append({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    H.identical(grads[1], grads[0])
    assert all(grad.any() for grad in grads[0].values())


def test_refuses_checkpointing_that_it_cannot_see(lib, is_ref):
    """The gradients go round the model's output."""
    if is_ref:
        pytest.skip("peft forgets the offsets there")
    ours, inside = plain(lib, again=True).train(), []
    ours.get_base_model().inner.register_forward_hook(lambda module, args, output: inside.append(output))
    ours(input_ids=IDS)
    with pytest.raises(lib.PeftError, match="gradient checkpointing"):
        inside[0].sum().backward()


def test_warnings(lib, ref, both):
    for module in (lib, ref):
        with pytest.warns(UserWarning, match="CAUSAL_LM"):
            module.get_peft_model(Decoder(), module.LoraConfig(target_modules=["inner"], alora_invocation_tokens=[5]))
    for model in both:
        embeds = model.get_input_embeddings()(IDS)
        with pytest.warns(UserWarning, match="aLoRA"):
            got = logits(model, input_ids=None, inputs_embeds=embeds)
        with model.disable_adapter():
            same(got, logits(model), 1e-10)
        with pytest.warns(UserWarning, match="aLoRA"):
            model.generate(inputs_embeds=embeds, max_new_tokens=1)


def test_bad_offsets(lib, is_ref, both):
    if is_ref:
        pytest.skip("errors of this library")
    for offsets, what in (([1, -2, None, 3], "at least 0"), ([1, 2, 3], "3 samples, that of a layer 4")):
        with pytest.raises(lib.BatchError, match=what):
            logits(both[1], alora_offsets=offsets)
    assert both[1].base_model.context.now.by_sample == {}


def test_is_no_plain_lora(lib, is_ref, both):
    if is_ref:
        pytest.skip("disputed: peft adds its factors to those of others, whatever the sequence")
    ours = both[1]
    assert not ours.supports_lora_conversion()
    with pytest.raises(lib.MergeError):
        ours.merge_adapter()
    H.close({"y": logits(ours)}, {"y": logits(both[0])}, TOLERANCE)
    for other in ("plain", "other"):
        with pytest.raises(lib.PeftError, match="alora_invocation_tokens"):
            ours.base_model.add_weighted_adapter(["default", other], [1.0, 1.0], "sum", combination_type="linear")


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_those_of_one_sequence_add_up(lib, ref, kind):
    models = [adapted(module, all_tokens={"default": [5, 6], "other": [5, 6]}) for module in (ref, lib)]
    for model in models:
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=kind)
        model.set_adapter("sum")
    got, want = map(logits, models)
    same(got, want, 1e-5)
    with models[1].disable_adapter():
        assert changed_from(got, logits(models[1])) == BEGINS["default"]
