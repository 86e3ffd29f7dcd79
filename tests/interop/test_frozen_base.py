"""No load changes a bit of the frozen model, whatever is trained in full beside an adapter."""

import inspect

import pytest
import torch

from . import bases as B
from . import harness as H
from .cases import CASES, each_case

NAMES = {  # the input embedding, the head, a layer to adapt, and what holds several layers
    "llama": ("embed_tokens", "lm_head", "q_proj", "model"),
    "llama_tied": ("embed_tokens", "lm_head", "q_proj", "model"),
    "bert": ("word_embeddings", "pooler.dense", "query", "pooler"),
    "t5": ("shared", "lm_head", "q", "decoder"),
    "bart": ("shared", "lm_head", "q_proj", "decoder"),
}
BASES = {base.name: base for base in (B.LLAMA, B.LLAMA_TIED, B.BERT, B.T5, B.BART)}
CONFIGS = {
    "embedding": lambda e, h, q, n: {"modules_to_save": [e]},
    "head": lambda e, h, q, n: {"modules_to_save": [h]},
    "both": lambda e, h, q, n: {"modules_to_save": [e, h]},
    "tied": lambda e, h, q, n: {"modules_to_save": [e], "ensure_weight_tying": True},
    "nested": lambda e, h, q, n: {"modules_to_save": [n], "target_modules": [h] if n == "model" else [q]},
    "embedding beside an adapted head": lambda e, h, q, n: {"modules_to_save": [e], "target_modules": [q, h]},
    "head beside an adapted embedding": lambda e, h, q, n: {"modules_to_save": [h], "target_modules": [q, e]},
    "adapted embedding": lambda e, h, q, n: {"target_modules": [q, e]},
    "rows": lambda e, h, q, n: {"trainable_token_indices": {e: [1, 4]}},
    "tied rows": lambda e, h, q, n: {"trainable_token_indices": {e: [1, 4]}, "ensure_weight_tying": True},
    "nothing": lambda e, h, q, n: {},
}


def frozen(model):
    """A model's parameters, and a copy of their values."""
    return {name: (p, p.detach().clone()) for name, p in model.named_parameters()}


def assert_frozen(before, but=()):
    changed = [name for name, (p, value) in before.items() if H.bits(p) != H.bits(value) and name not in but]
    assert not changed, f"changed by loading: {changed}"


def loaded_in_every_way(lib, build, config, folder, anew=False):
    """Models with the adapter in `folder` active, and the parameters of the frozen model within, as they were.

    `anew`: not those where it takes the place of the values that an adapter has.
    """
    base = build()
    before = frozen(base)
    yield lib.PeftModel.from_pretrained(base, folder), before
    for name in ("new",) if anew else ("new", "default"):  # beside an adapter, and into it
        base = build()
        before = frozen(base)
        model = lib.get_peft_model(base, config())
        model.load_adapter(folder, name)
        model.set_adapter(name)
        yield model, before
    if anew:
        return
    base = build()
    before = frozen(base)
    model = lib.get_peft_model(base, config())
    state = lib.PeftModel.from_pretrained(build(), folder)
    lib.set_peft_model_state_dict(model, lib.get_peft_model_state_dict(state))
    yield model, before


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("which", CONFIGS)
@pytest.mark.parametrize("base", NAMES)
def test_whatever_is_trained_in_full(base, which, save, lib, ref, tmp_path):
    """As peft writes it and as we do, with the whole embedding layers in the file or not."""
    pytest.importorskip("transformers")
    names, base = NAMES[base], BASES[base]
    fields = {"r": 2, "init_lora_weights": False, "target_modules": [names[2]], **CONFIGS[which](*names)}
    written = {}
    writers = (lib,) if "tied" in which and names[0] == "shared" else (lib, ref)  # peft leaves those untied
    for writer in writers:
        H.seed(0)
        model = H.move(writer.get_peft_model(base.build(), writer.LoraConfig(**fields))).eval()
        folder = tmp_path / writer.__name__
        written[writer.__name__], _ = H.saved(model, folder, save_embedding_layers=save)
        want = H.run(model, base.inputs())
        ways = loaded_in_every_way(lib, base.build, lambda: lib.LoraConfig(**fields), str(folder))
        for again, before in ways if writer is lib and not save else [next(ways)]:
            assert_frozen(before)
            H.close(H.run(again.eval(), base.inputs()), want, 2e-5)
            with again.disable_adapter():
                H.identical(H.run(again, base.inputs()), H.run(base.build(), base.inputs()))
    assert len({tuple(sorted(tensors)) for tensors in written.values()}) == 1, "other keys than peft's"


@pytest.mark.parametrize("copied", [None, "lm_head", "embed_tokens"])
@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts(config, copied, lib, ref, tmp_path):
    """With the whole embedding layers in the file."""
    pytest.importorskip("transformers")
    fields = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "modules_to_save": copied and [copied]}
    written = []
    for writer in (ref, lib):
        H.seed(0)
        model = H.move(writer.get_peft_model(B.LLAMA.build(), getattr(writer, config)(**fields))).eval()
        folder = tmp_path / writer.__name__
        written.append(set(H.saved(model, folder, save_embedding_layers=True)[0]))
        want = H.run(model, B.LLAMA.inputs())
        ways = loaded_in_every_way(lib, B.LLAMA.build, lambda: getattr(lib, config)(**fields), str(folder))
        for again, before in ways:
            assert_frozen(before)
            H.close(H.run(again.eval(), B.LLAMA.inputs()), want, 2e-5)
    assert written[0] == written[1]


def with_head(base, name):
    """A model that says that `name` is its output layer."""
    kind = type(base)
    if not hasattr(kind, "get_input_embeddings"):
        getters = "get_input_embeddings", "get_output_embeddings"
        base.__class__ = type(kind.__name__, (kind,), dict.fromkeys(getters, lambda self: self.get_submodule(name)))
    return base


def untouched(lib, case):
    """The last layer with a weight that the case's adapter leaves alone."""
    model = H.adapt(lib, case).get_base_model()
    plain = dict(case.base.build().named_modules())
    left = [name for name, module in model.named_modules() if type(module) is type(plain.get(name))]
    return [name for name in left if type(plain[name]) in (torch.nn.Linear, torch.nn.Embedding)][-1:]


def adapted(lib, case):
    """The weights of the layers that the case's adapter is on."""
    layers = [n for n, m in H.adapt(lib, case).get_base_model().named_modules() if hasattr(m, "base_layer")]
    return [f"{name}.weight" for name in layers]


def batch(case):
    return H.without_labels(H.inputs(case)) if case.own_loss else H.inputs(case)


def has_modules_to_save(lib, case):
    return "modules_to_save" in inspect.signature(getattr(lib, case.config)).parameters


FIRST = {c.method: c.id for c in reversed(CASES) if c.id.endswith("/plain") and "modules_to_save" not in c.kwargs}


@each_case(lambda c: c.id in FIRST.values())
def test_every_method(case, lib, tmp_path):
    """With an output layer that is trained in full beside it, all that is in the file said twice."""
    if not (has_modules_to_save(lib, case) and (name := untouched(lib, case))):
        pytest.skip("nothing can be trained in full beside this method")

    def build():
        return with_head(case.base.build(), name[0])

    def config():
        return H.config(lib, case, modules_to_save=name)

    H.seed(0)
    model = H.move(lib.get_peft_model(build(), config())).eval()
    H.saved(model, tmp_path, save_embedding_layers=True)
    want = H.run(model, batch(case))
    anew = case.method == "p_tuning"  # saved without the network that makes it, so it cannot be trained on
    for again, before in loaded_in_every_way(lib, build, config, str(tmp_path), anew):
        assert_frozen(before, but=adapted(lib, case) if case.method == "kasa" else ())  # it truncates those, always
        H.close(H.run(again.eval(), batch(case)), want, 2e-5)
