"""Models of images and speech have no input embedding: adapters go to disk and back all the same, as in peft."""

import functools
import warnings

import pytest
import torch
from torch import nn

from . import harness as H

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": (8, 8),
    "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "vocab_size": 20, "layerdrop": 0.0,
}
STAGES = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}


class Custom(nn.Module):
    """Two layers; `answer` is what it says of its embeddings."""

    def __init__(self, answer):
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 4)
        if answer == "none":
            self.get_input_embeddings = self.get_output_embeddings = lambda: None
        elif answer == "raises":
            self.get_input_embeddings = self.get_output_embeddings = self.refuse

    def refuse(self):
        raise NotImplementedError

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


MODELS = {  # name: (model, its config or argument, targets, module trained in full, input)
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
               ["convolution"], "classifier", (2, 3, 32, 32)),
    "convnext": ("ConvNextForImageClassification", STAGES, ["pwconv1", "pwconv2"], "classifier", (2, 3, 64, 64)),
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH, ["q_proj", "v_proj"], "lm_head", (2, 100)),
    "hubert": ("HubertForSequenceClassification", SPEECH, ["q_proj", "v_proj"], "classifier", (2, 100)),
    "missing": (Custom, "missing", ["one"], "two", (2, 8)),
    "none": (Custom, "none", ["one"], "two", (2, 8)),
    "raises": (Custom, "raises", ["one"], "two", (2, 8)),
}


@functools.cache
def _built(name):
    model, options, *_ = MODELS[name]
    torch.manual_seed(3)
    if isinstance(options, str):
        return model(options)
    return getattr(transformers, model)(getattr(transformers, model.split("For")[0] + "Config")(**options))


def build(name):
    model = _built(name)
    copied = Custom(MODELS[name][1]) if isinstance(model, Custom) else type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def config(lib, name, kind="LoraConfig", **fields):
    return getattr(lib, kind)(target_modules=MODELS[name][2], modules_to_save=[MODELS[name][3]], **fields)


def run(model, name):
    x = torch.randn(MODELS[name][4], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {"output": getattr(y := model(x), "logits", y)}


def trained(lib, name, **options):
    return H.move(lib.get_peft_model(build(name), config(lib, name, **options))).eval()


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig"])
@pytest.mark.parametrize("name", MODELS)
def test_to_disk_and_back(name, kind, lib, ref, tmp_path):
    model = trained(lib, name, kind=kind)
    want = run(model, name)
    for save in ("auto", False, True):
        model.save_pretrained(tmp_path / "ours", save_embedding_layers=save)
        assert not any("base_layer" in key for key in H.stored(tmp_path / "ours")[0])
        H.identical(run(lib.PeftModel.from_pretrained(build(name), tmp_path / "ours"), name), want)
    other = lib.get_peft_model(build(name), config(lib, name, kind=kind)).eval()
    other.load_adapter(tmp_path / "ours", "further")
    other.set_adapter("further")
    H.identical(run(other, name), want)
    lib.set_peft_model_state_dict(other, lib.get_peft_model_state_dict(model))
    other.set_adapter("default")
    H.identical(run(other, name), want)
    H.close(run(other.merge_and_unload(), name), want, 1e-5)
    there = "missing" if name in ("none", "raises") else name  # peft cannot save those
    theirs = trained(ref, there, kind=kind)
    theirs.save_pretrained(tmp_path / "theirs")
    H.close(run(lib.PeftModel.from_pretrained(build(name), tmp_path / "theirs"), name), run(theirs, there), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_from_a_model_that_checkpoints(name, lib):
    model = build(name)
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable()
    adapted = lib.get_peft_model(model, config(lib, name)).train()
    x = torch.randn(MODELS[name][4])
    getattr(y := adapted(x), "logits", y).sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("name", ["convnext", "missing", "none", "raises"])
def test_all_linear(name, lib):
    model = lib.get_peft_model(build(name), lib.LoraConfig(target_modules="all-linear"))
    want = {n for n, m in build(name).named_modules() if isinstance(m, nn.Linear)}
    assert set(model.targeted_module_names) == want


def test_says_what_is_not_there(lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft's warning differs by model")
    model = trained(lib, "resnet")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("Could not identify embedding layer(s)" in str(one.message) for one in seen)
