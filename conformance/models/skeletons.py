"""bert-base-cased, gpt2-large and t5-base without values: the models' parameter names and shapes on the meta device.

Counting needs no forward pass. A test compares names and shapes with transformers' own classes.
"""

from __future__ import annotations

import torch
from torch import nn

from .language_models import LMConfig
from .layers import Conv1D


class Skeleton(nn.Module):
    """Modules under dotted names, and the config fields that PEFT looks at."""

    def __init__(self, config, parts, tied=()):
        super().__init__()
        self.config = LMConfig(**config, tie_word_embeddings=bool(tied), use_return_dict=True, return_dict=True)
        for name, module in parts:
            parent = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, module)
        for name, source in tied:
            self.get_submodule(name).weight = self.get_submodule(source).weight

    @property
    def device(self):
        return torch.device("meta")

    def get_input_embeddings(self):
        return next(m for m in self.modules() if isinstance(m, nn.Embedding))

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return kwargs

    def _prepare_encoder_decoder_kwargs_for_generation(self, *args, **kwargs):
        return kwargs

    def forward(self, **inputs):
        raise NotImplementedError("a skeleton has no values to run with")


class RMSNorm(nn.Module):
    """T5's norm: a weight and no bias."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


def bert(head, pooler, vocab=28996, d=768, layers=12, inner=3072, positions=512):
    e = "embeddings"
    parts: list[tuple[str, nn.Module]] = [
        (f"{e}.word_embeddings", nn.Embedding(vocab, d)), (f"{e}.position_embeddings", nn.Embedding(positions, d)),
        (f"{e}.token_type_embeddings", nn.Embedding(2, d)), (f"{e}.LayerNorm", nn.LayerNorm(d))]
    for i in range(layers):
        at = f"encoder.layer.{i}"
        parts += [(f"{at}.attention.self.{n}", nn.Linear(d, d)) for n in ("query", "key", "value")]
        parts += [(f"{at}.attention.output.dense", nn.Linear(d, d)), (f"{at}.attention.output.LayerNorm",
                                                                      nn.LayerNorm(d)),
                  (f"{at}.intermediate.dense", nn.Linear(d, inner)), (f"{at}.output.dense", nn.Linear(inner, d)),
                  (f"{at}.output.LayerNorm", nn.LayerNorm(d))]
    if pooler:
        parts.append(("pooler.dense", nn.Linear(d, d)))
    if head:
        parts = [(f"bert.{n}", m) for n, m in parts] + [(head, nn.Linear(d, 2))]
    return Skeleton({"model_type": "bert", "vocab_size": vocab, "hidden_size": d, "num_hidden_layers": layers,
                     "num_attention_heads": 12, "is_encoder_decoder": False, "num_labels": 2}, parts)


def gpt2(vocab=50257, d=1280, layers=36, positions=1024):
    parts: list[tuple[str, nn.Module]] = [
        ("transformer.wte", nn.Embedding(vocab, d)), ("transformer.wpe", nn.Embedding(positions, d))]
    for i in range(layers):
        at = f"transformer.h.{i}"
        parts += [(f"{at}.ln_1", nn.LayerNorm(d)), (f"{at}.attn.c_attn", Conv1D(3 * d, d)),
                  (f"{at}.attn.c_proj", Conv1D(d, d)), (f"{at}.ln_2", nn.LayerNorm(d)),
                  (f"{at}.mlp.c_fc", Conv1D(4 * d, d)), (f"{at}.mlp.c_proj", Conv1D(d, 4 * d))]
    parts += [("transformer.ln_f", nn.LayerNorm(d)), ("lm_head", nn.Linear(d, vocab, bias=False))]
    return Skeleton({"model_type": "gpt2", "vocab_size": vocab, "hidden_size": d, "num_hidden_layers": layers,
                     "num_attention_heads": 20, "is_encoder_decoder": False}, parts, [("lm_head", "transformer.wte")])


def t5(vocab=32128, d=768, inner=3072, layers=12, heads=12):
    def linear(i, o):
        return nn.Linear(i, o, bias=False)

    parts: list[tuple[str, nn.Module]] = [("shared", nn.Embedding(vocab, d))]
    for stack in ("encoder", "decoder"):
        parts.append((f"{stack}.embed_tokens", nn.Embedding(vocab, d)))
        attentions = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
        for i in range(layers):
            at = f"{stack}.block.{i}.layer"
            for j, kind in enumerate(attentions):
                parts += [(f"{at}.{j}.{kind}.{n}", linear(d, d)) for n in "qkvo"]
                if i == j == 0:
                    parts.append((f"{at}.0.SelfAttention.relative_attention_bias", nn.Embedding(32, heads)))
                parts.append((f"{at}.{j}.layer_norm", RMSNorm(d)))
            last = f"{at}.{len(attentions)}"
            parts += [(f"{last}.DenseReluDense.wi", linear(d, inner)), (f"{last}.DenseReluDense.wo", linear(inner, d)),
                      (f"{last}.layer_norm", RMSNorm(d))]
        parts.append((f"{stack}.final_layer_norm", RMSNorm(d)))
    parts.append(("lm_head", linear(d, vocab)))
    tied = [(n, "shared") for n in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")]
    return Skeleton({"model_type": "t5", "vocab_size": vocab, "hidden_size": d, "d_model": d, "num_layers": layers,
                     "num_hidden_layers": layers, "num_heads": heads, "num_attention_heads": heads,
                     "is_encoder_decoder": True}, parts, tied)


MODELS = {
    "bert-base-cased/SEQ_CLS": lambda: bert("classifier", pooler=True),
    "bert-base-cased/TOKEN_CLS": lambda: bert("classifier", pooler=False),
    "bert-base-cased/QUESTION_ANS": lambda: bert("qa_outputs", pooler=False),
    "bert-base-cased/FEATURE_EXTRACTION": lambda: bert(None, pooler=True),
    "gpt2-large/CAUSAL_LM": gpt2,
    "t5-base/SEQ_2_SEQ_LM": t5,
}


def make(name):
    return MODELS[name]()
