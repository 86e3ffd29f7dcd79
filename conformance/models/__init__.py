"""Base models in torch, built from the data in a case. For drivers that live in a torch process."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from . import decoders, language_models, skeletons
from .layers import make_layer

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16,
          "float16": torch.float16}


class Net(nn.Module):
    """Layers in order, under dotted names; looked up at every call, so they may be replaced."""

    def __init__(self, layers):
        super().__init__()
        self.order = [name for name, _, _ in layers]
        for name, kind, args in layers:
            parent = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, make_layer(kind, args))
        self.attention = {name for name, kind, _ in layers if kind == "MultiheadAttention"}

    def forward(self, x):
        for name in self.order:
            layer = self.get_submodule(name)
            x = layer(x, x, x)[0] if name in self.attention else layer(x)
        return x


class States(Net):
    """A Net that shows its hidden states as models of transformers do: the last are what its last layer is given."""

    def __init__(self, layers):
        super().__init__(layers)
        self.config = language_models.LMConfig(model_type="tiny")

    def forward(self, input_ids=None, inputs_embeds=None, output_hidden_states=False, return_dict=True):
        *others, last = self.order
        x = inputs_embeds if input_ids is None else input_ids
        states = []
        for name in others:
            x = self.get_submodule(name)(x)
            states.append(x)
        y = self.get_submodule(last)(x)
        return language_models.Output(logits=y, hidden_states=tuple(states)) if output_hidden_states else y


class TellingNet(Net):
    """A Net that says itself what its first and its output layer are, as models of transformers do."""

    def __init__(self, base):
        super().__init__(base["layers"])
        self.input, self.output = base.get("input_layer"), base["output"]

    def get_output_embeddings(self):
        return self.get_submodule(self.output) if self.output else None

    def get_input_embeddings(self):
        return self.get_submodule(self.input) if self.input else None


def pretrained(base):
    """A Net that says what its output layer is (None: it has none); for an implementation that imports transformers, it
    is one of transformers' models, since such a one may ask for that."""
    if "transformers" not in sys.modules:
        return TellingNet(base)
    from transformers import PretrainedConfig, PreTrainedModel

    class PretrainedNet(PreTrainedModel):
        config_class, forward = PretrainedConfig, Net.forward

        def __init__(self):
            super().__init__(PretrainedConfig())
            net = Net(base["layers"])
            self.order, self.attention = net.order, net.attention
            for name, module in net.named_children():
                self.add_module(name, module)

        def get_output_embeddings(self):
            return self.get_submodule(base["output"]) if base["output"] else None

        def get_input_embeddings(self):
            return self.get_submodule(base["input_layer"]) if "input_layer" in base else None

    return PretrainedNet()


TRANSFORMERS = {  # the class of a small base model of transformers, for AutoPeftModel<kind>
    "ForCausalLM": "GPT2LMHeadModel", "ForSeq2SeqLM": "T5ForConditionalGeneration",
    "ForSequenceClassification": "GPT2ForSequenceClassification",
    "ForTokenClassification": "GPT2ForTokenClassification", "ForQuestionAnswering": "GPT2ForQuestionAnswering",
    "ForFeatureExtraction": "GPT2Model", "": "GPT2Model"}
VOCABULARY = 16


def of_transformers(kind: str):
    """(a small model of transformers, always with the same weights; ids for it)."""
    import transformers

    cls = getattr(transformers, TRANSFORMERS[kind])
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1} if kind != "ForSeq2SeqLM" else {
        "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "num_layers": 1}
    seed(0)
    model = cls(cls.config_class(vocab_size=VOCABULARY, pad_token_id=0, decoder_start_token_id=0, **sizes))
    return model, torch.tensor([[1, 2, 3, 5], [4, 3, 2, 1]])


def tokenizer(words: int):
    """One of so many words."""
    import tokenizers
    import transformers

    known = {f"w{i}": i for i in range(words)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="w0")))


def answer(output, has_labels=False):
    """What a case compares of a model's output: the loss (1,) if labels were given, else logits or hidden states."""
    if has_labels:
        return output.loss.reshape(1)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1)
    output = output[0] if isinstance(output, tuple) else output
    return getattr(output, "logits", getattr(output, "last_hidden_state", output))


def seed(value):
    """torch.manual_seed for models on the CPU, in a hundredth of its time."""
    torch.default_generator.manual_seed(value)


def make(base):
    """The base model of a case's description, its weights yet to be set."""
    if base.get("model") in language_models.KINDS:
        return language_models.KINDS[base["model"]](base)
    if base.get("model") == "decoder":
        return decoders.DecoderLM(base)
    if base.get("model") == "skeleton":
        return skeletons.make(base["name"])
    if "output" in base:
        return pretrained(base)
    net: Any = (States if base.get("states") else Net)(base["layers"])
    if "model_type" in base:
        net.config = {"model_type": base["model_type"]}
    return net
