"""Tensors of another shape: an error that tells so in torch's words, or left out where that is asked for."""

import copy
import warnings

import pytest
import torch

from . import bases as B
from . import harness as H
from .cases import CASES, each_case

FIRST = {c.method: c.id for c in reversed(CASES) if c.id.endswith("/plain")}


def ways(lib, case, folder, **options):
    """Each way to load what is in `folder` (name, model before, call)."""

    def adapted():
        return H.adapt(lib, case)

    base = case.base.build()
    yield "default", base, lambda: lib.PeftModel.from_pretrained(base, folder, **options)
    for name in ("new", "default"):
        model = adapted()
        yield name, model, lambda name=name, model=model: model.load_adapter(folder, name, **options) and model


@each_case(lambda c: c.id in FIRST.values())
def test_every_method(case, lib, tmp_path):
    """One tensor that does not fit: nothing is loaded, or all the others are."""
    model = H.move(H.adapt(lib, case), case.scale)
    tensors, _ = H.saved(model, tmp_path)
    trained = {n.replace(".default", "") for n, p in model.named_parameters() if p.requires_grad}
    key = min(trained & tensors.keys(), default=max(k for k, t in tensors.items() if t.dim()))  # not what is shared
    whole = dict(tensors)
    tensors[key] = torch.cat([tensors[key], tensors[key][:1]])
    H.safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    for _, before, load in ways(lib, case, str(tmp_path)):
        state = H.snapshot(before)
        with pytest.raises(lib.errors.CheckpointError, match="size mismatch for ") as error:
            load()
        assert isinstance(error.value, RuntimeError) and key.removeprefix("base_model.model.") in str(error.value)
        H.identical(H.snapshot(before), state)
    if case.method == "p_tuning":
        return  # an adapter that is there cannot take over a prompt, of whatever shape
    for name, _, load in ways(lib, case, str(tmp_path), ignore_mismatched_sizes=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = load() or model
        assert any("size mismatch for " in str(w.message) for w in caught)
        if not hasattr(loaded, "peft_config"):
            continue
        assert not any(t.is_meta for t in loaded.state_dict().values())
        got = lib.get_peft_model_state_dict(loaded, adapter_name=name)
        assert got[key].shape == whole[key].shape
        H.identical({k: got[k] for k in whole if k != key}, {k: whole[k] for k in whole if k != key})
        H.run(loaded.eval(), H.inputs(case))


def test_a_head_for_other_classes(lib, ref, tmp_path):
    """As in peft: the adapter is loaded, and the head keeps what the new model has."""
    pytest.importorskip("transformers")
    fields = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"], "init_lora_weights": False}
    model = H.move(ref.get_peft_model(B.BERT_SEQ.build(), ref.LoraConfig(**fields)))
    H.saved(model, tmp_path)
    base = B.BERT_SEQ.build()
    base.classifier = torch.nn.Linear(16, 5)
    base.config.num_labels = base.num_labels = 5
    outputs = []
    for module in (lib, ref):
        net = copy.deepcopy(base)
        loaded = module.PeftModel.from_pretrained(net, str(tmp_path), ignore_mismatched_sizes=True).eval()
        outputs.append(H.run(loaded, H.without_labels(B.BERT_SEQ.inputs())))
        beside = module.get_peft_model(copy.deepcopy(base), module.LoraConfig(**fields))
        beside.load_adapter(str(tmp_path), "new", ignore_mismatched_sizes=True)
        beside.set_adapter("new")
        outputs.append(H.run(beside.eval(), H.without_labels(B.BERT_SEQ.inputs())))
    for out in outputs[:-1]:
        H.close(out, outputs[-1], 2e-5)


def resized(tokens):
    base = B.LLAMA.build()
    base.resize_token_embeddings(tokens, mean_resizing=False)
    return base.eval()


@pytest.mark.parametrize("tokens", [False, True])
def test_a_resized_vocabulary(tokens, lib, ref, tmp_path):
    """Rows that are saved as the model's own are written into a model of that size, and into no other."""
    pytest.importorskip("transformers")
    fields = {"trainable_token_indices": [1, 33]} if tokens else {}
    config = lib.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **fields)
    model = H.move(lib.get_peft_model(resized(36), config)).eval()
    want = H.run(model, B.LLAMA.inputs())
    H.saved(model, tmp_path, save_embedding_layers=True)
    for load in (lib.PeftModel, ref.PeftModel):
        again = load.from_pretrained(resized(36), str(tmp_path)).eval()  # whose new rows are others
        H.close(H.run(again, B.LLAMA.inputs()), want, 2e-5)
    base = B.LLAMA.build()
    before = H.snapshot(base)
    match = "must be from 0 to 29" if tokens else r"size mismatch for .*resize_token_embeddings\(36\)"
    with pytest.raises(lib.errors.PeftError, match=match):
        lib.PeftModel.from_pretrained(base, str(tmp_path))
    H.identical(H.snapshot(base), before)
    assert not hasattr(base, "peft_config")


def test_rows_said_twice(lib, tmp_path):
    """Two values for one tensor of the model, as a head that is tied here and was not there: not the last one."""
    pytest.importorskip("transformers")
    config = lib.LoraConfig(r=2, target_modules=["q_proj"])
    H.saved(lib.get_peft_model(B.LLAMA.build(), config), tmp_path, save_embedding_layers=True)
    base = B.LLAMA_TIED.build()
    before = H.snapshot(base)
    with pytest.raises(lib.errors.CheckpointError, match="one tensor of the model"):
        lib.PeftModel.from_pretrained(base, str(tmp_path))
    H.identical(H.snapshot(base), before)


def test_code_that_knows_torch(lib, tmp_path):
    """Trainer takes a RuntimeError of a prompt, at the end of training, for what it is."""
    pytest.importorskip("transformers")
    fields = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3, "prefix_projection": True}
    model = lib.get_peft_model(B.BERT_SEQ.build(), lib.PrefixTuningConfig(**fields))
    H.saved(model, tmp_path)
    before = H.snapshot(model)
    with pytest.raises(RuntimeError, match="cannot be loaded into one that is being trained"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    H.identical(H.snapshot(model), before)
