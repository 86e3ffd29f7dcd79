"""Adaption prompts beyond the table of cases: heads of another size, own modules, plain attention, generation."""

import copy
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from . import bases as B
from . import harness as H


def adapted(lib, base, **config):
    H.seed(0)
    config = lib.AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 1, **config})
    return lib.get_peft_model(base, config).eval()


def written_out(attention, x, cos, sin):
    """The method's formula for one attention module of Llama's kind, one sample and one head at a time."""
    m, d = attention.model, attention.model.head_dim
    q, k, v = m.q_proj(x), m.k_proj(attention.adaption_prompt)[0], m.v_proj(attention.adaption_prompt)[0]
    heads, shared = q.shape[-1] // d, q.shape[-1] // k.shape[-1]
    rows = []
    for b in range(len(x)):
        parts = []
        for h in range(heads):
            own, other = slice(h * d, (h + 1) * d), slice(h // shared * d, (h // shared + 1) * d)
            half = q[b, :, own]
            turned = torch.cat([-half[:, d // 2 :], half[:, : d // 2]], 1)
            query = half * cos[b] + turned * sin[b]
            shares = torch.softmax(query @ k[:, other].T / math.sqrt(d), -1)
            parts.append(attention.adaption_gate * shares @ v[:, other])
        rows.append(torch.cat(parts, 1))
    return m.o_proj(torch.stack(rows))


@pytest.mark.parametrize("options", [{"head_dim": 4}, {"head_dim": 16, "num_key_value_heads": 1}, {}], ids=str)
def test_formula(options, lib, is_ref):
    if is_ref and options:
        pytest.skip("disputed: see the next test")
    base = B._hf("MistralConfig", "MistralForCausalLM", **{**B._LLAMA, **options})()
    model = H.move(adapted(lib, base).double(), 0.5)
    attention = base.model.layers[-1].self_attn
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    positions = torch.arange(5).expand(2, -1)
    cos, sin = (t.double() for t in base.model.rotary_emb(x, positions))
    call = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": None}
    with torch.no_grad():
        added = attention(**call)[0] - attention.model(**call)[0]
        H.close({"added": added}, {"added": written_out(attention, x, cos, sin)}, 1e-6 if is_ref else 1e-12)
        assert added.abs().max() > 1e-3
        assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, B.VOCAB)


def test_peft_cannot_take_heads_of_another_size(ref):
    """It takes in_features / out_features of k_proj for the number of queries that share keys."""
    for options in ({"head_dim": 4}, {"head_dim": 16}):
        base = B._hf("MistralConfig", "MistralForCausalLM", **{**B._LLAMA, **options})()
        model = adapted(ref, base)
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            model(input_ids=torch.tensor([[3, 4, 5]]))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim = 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden_states):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(hidden_states).unflatten(-1, (-1, 4)).transpose(1, 2) for p in projections)
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def own_model():
    torch.manual_seed(3)
    return nn.Sequential(Attention(), Attention(), nn.Linear(8, 3)).eval()


def test_modules_of_ones_own(lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft needs a transformers model")
    for target in ("0", "1"):
        base = own_model()
        x = torch.randn(2, 5, 8)
        before = base(x)
        model = H.move(adapted(lib, base, target_modules=target), 0.5)
        assert model.get_nb_trainable_parameters()[0] == 3 * 8 + 1
        got = model(x)
        assert not torch.allclose(got, before)
        with model.disable_adapter():
            assert torch.equal(model(x), before)
        model.save_pretrained(str(tmp_path / target))
        again = lib.PeftModel.from_pretrained(own_model(), str(tmp_path / target))
        assert torch.equal(again(x), got)
        assert torch.equal(model.unload()(x), before)


def test_refusals_leave_the_model_alone(lib, is_ref):
    if is_ref:
        pytest.skip("peft changes the model before it refuses")
    base = own_model()
    before, modules = copy.deepcopy(base.state_dict()), [id(m) for m in base.modules()]
    for config in ({}, {"target_modules": "2"}, {"target_modules": "0", "adapter_layers": 2},
                   {"target_modules": "0", "adapter_len": 0}, {"target_modules": "0", "adapter_layers": None}):
        with pytest.raises(lib.PeftError):
            adapted(lib, base, **config)
    base.config = SimpleNamespace(model_type="qwen2")
    with pytest.raises(lib.PeftError, match="qwen2"):
        adapted(lib, base, target_modules="0")
    assert [id(m) for m in base.modules()] == modules and all(p.requires_grad for p in base.parameters())
    H.identical(base.state_dict(), before)


def test_a_checkpoint_that_does_not_fit(lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft loads what fits")
    adapted(lib, own_model(), target_modules="0").save_pretrained(str(tmp_path))
    config = lib.AdaptionPromptConfig(target_modules="0", adapter_len=4, adapter_layers=1)
    base = own_model()
    with pytest.raises(lib.CheckpointError, match="another shape"):
        lib.PeftModel.from_pretrained(base, str(tmp_path), config=config)
    assert type(base[0]) is Attention and not hasattr(base, "peft_config")


@pytest.mark.parametrize("base", [B.LLAMA, B.MISTRAL, B.GPT2], ids=lambda b: b.name)
def test_the_cache_changes_nothing(base, lib):
    model = H.move(adapted(lib, base.build(), task_type="CAUSAL_LM", adapter_layers=2), 0.5)
    ids = {"input_ids": torch.tensor([[3, 4, 5], [7, 8, 9]])}
    options = {"max_new_tokens": 5, "do_sample": False}
    for beams in (1, 2):
        with_cache, without = (model.generate(**ids, **options, num_beams=beams, use_cache=c) for c in (True, False))
        assert torch.equal(with_cache, without)


@pytest.mark.parametrize("base", [B.LLAMA, B.GPT2], ids=lambda b: b.name)
def test_gradient_checkpointing(base, lib):
    grads = []
    for on in (False, True):
        model = H.move(adapted(lib, base.build(), task_type="CAUSAL_LM", adapter_layers=2), 0.5)
        if on:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**base.inputs()).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    H.close(grads[1], grads[0], 1e-5)


def test_copies_and_pickles(lib):
    model = H.move(adapted(lib, B.LLAMA.build()), 0.5)
    model.add_adapter("other", lib.AdaptionPromptConfig(adapter_len=2, adapter_layers=2))
    twin = copy.deepcopy(model)
    batch = B.LLAMA.inputs()
    for m in (model, twin):
        m.set_adapter("other")
        H.move(m, 0.5)
    H.identical(H.run(twin, batch), H.run(model, batch))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_mixed_and_plain_passes_of_several_threads(lib, is_ref):
    if is_ref:
        pytest.skip("peft has no mixed batches of adaption prompts")
    model = adapted(lib, B.LLAMA.build())
    model.add_adapter("other", lib.AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    model = H.move(model).eval()
    ids, names = torch.randint(1, 20, (2, 5)), ["default", "other"]
    calls = [{"adapter_names": names}, {}] * 2
    want = [model(input_ids=ids, **call).logits for call in calls]
    hooks = lambda: {id(module): set(module._forward_hooks) for module in model.modules()}
    before, during = hooks(), []
    model.base_model.model.lm_head.register_forward_hook(lambda *_: during.append(hooks()))
    got = [[None] * 40 for _ in calls]

    def run(k):
        for i in range(40):
            got[k][i] = model(input_ids=ids, **calls[k]).logits

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, outputs in zip(want, got):
        assert all(output is not None and torch.equal(output, one) for output in outputs)
    after = hooks()  # torch looks up each of the hooks that it has listed: none may come or go meanwhile
    assert during and all(now == after for now in during) and all(after[key] >= before[key] for key in before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_mixed_batches_under_gradient_checkpointing(reentrant, lib, is_ref):
    if is_ref:
        pytest.skip("peft has no mixed batches of adaption prompts")
    found = []
    for checkpointed in (False, True):
        model = adapted(lib, B.LLAMA.build(), adapter_layers=2)
        model.add_adapter("other", lib.AdaptionPromptConfig(adapter_len=3, adapter_layers=2))
        model = H.move(model)
        model.set_requires_grad(["default", "other"])
        model.base_model.model.enable_input_require_grads()
        if checkpointed:
            model.train()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            for module in model.modules():  # a mixed batch is refused in training
                module.training = hasattr(module, "gradient_checkpointing")
        ids = torch.arange(1, 11).view(2, 5)
        model(input_ids=ids, adapter_names=["default", "other"]).logits.square().sum().backward()
        every = model.base_model.prompts
        found.append([[a.adaption_prompt.grad for a in prompts.values()] for prompts in every.values()])
    for plain, again in zip(*found):
        for one, two in zip(plain, again):
            torch.testing.assert_close(one, two)
