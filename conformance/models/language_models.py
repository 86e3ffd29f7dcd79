"""Tiny language models in torch: a decoder, an encoder with the heads of four tasks, an encoder-decoder.

They keep what prompt learning asks of a model and no more, so that prompts and task classes run without transformers.
The list of it stands in `minipeft/prompt.py`; peft asks for the same.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class LMConfig(SimpleNamespace):
    """The fields of a transformers config that prompt learning looks at."""

    def to_dict(self):
        return dict(vars(self))

    def get(self, key, default=None):
        return getattr(self, key, default)

    def __contains__(self, key):
        return hasattr(self, key)


class Output(SimpleNamespace):
    """What a model returns: `logits` or the task's own, `loss` where labels were given, `past_key_values`."""


class Attention(nn.Module):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, hidden, heads, kv_heads=None, head_dim=None):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        width = head_dim or hidden // heads
        self.q_proj = nn.Linear(hidden, heads * width)
        self.k_proj, self.v_proj = (nn.Linear(hidden, self.kv_heads * width) for _ in "kv")
        self.o_proj = nn.Linear(heads * width, hidden)

    def forward(self, x, source, past=None, mask=None, causal=False):
        """Attention of x to `past` and `source`; `mask` (batch, past + source) is 0 where a token is hidden."""

        def split(t, heads):
            return t.unflatten(-1, (heads, -1)).transpose(1, 2)

        q = split(self.q_proj(x), self.heads)
        k, v = (split(proj(source), self.kv_heads) for proj in (self.k_proj, self.v_proj))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        shown = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device)
        if causal:
            shown = shown.tril(k.shape[2] - q.shape[2])
        if mask is not None:
            shown = shown & mask.bool()[:, None, None]
        each = self.heads // self.kv_heads  # queries that share a key
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(each, 1), v.repeat_interleave(each, 1), shown)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    def __init__(self, hidden, heads, cross, **grouped):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(hidden), Attention(hidden, heads, **grouped)
        if cross:
            self.cross_norm, self.cross_attn = nn.LayerNorm(hidden), Attention(hidden, heads)
        self.mlp = nn.Linear(hidden, hidden)


class Layers(nn.Module):
    """Word and position embeddings, where there are any, and blocks of pre-norm attention and a Tanh MLP."""

    embed_tokens: Any
    embed_positions: Any
    embed_types: Any
    layers: Any

    def __init__(self, base, words=True, causal=False, cross=False):
        super().__init__()
        hidden, heads, depth = base["hidden"], base["heads"], base["depth"]
        self.config = LMConfig(
            vocab_size=base["vocab"], hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=depth,
            model_type="tiny", is_encoder_decoder=False, tie_word_embeddings=False, pad_token_id=0,
            decoder_start_token_id=1, problem_type=None,
            use_return_dict=True)  # which peft asked for up to 0.19
        grouped = {k: base[k] for k in ("kv_heads", "head_dim") if k in base}
        if grouped:
            self.config.num_key_value_heads = base["kv_heads"]
            self.config.head_dim = base["head_dim"]
        self.embed_tokens = nn.Embedding(base["vocab"], hidden) if words else None
        self.embed_positions = nn.Embedding(base["positions"], hidden) if "positions" in base else None
        self.embed_types = nn.Embedding(base["types"], hidden) if "types" in base else None
        self.layers = nn.ModuleList(Block(hidden, heads, cross, **grouped) for _ in range(depth))
        self.causal = causal

    def get_input_embeddings(self):
        return self.embed_tokens

    def states(self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, position_ids=None,
               memory=None, memory_mask=None, token_type_ids=None):
        """(hidden states, keys and values of all layers); positions count from the cache on."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = pairs(past_key_values, len(self.layers))
        if self.embed_positions is not None:
            start = 0 if past[0] is None else past[0][0].shape[2]
            places = torch.arange(start, start + x.shape[1], device=x.device) if position_ids is None else position_ids
            x = x + self.embed_positions(places)
        if token_type_ids is not None:
            x = x + self.embed_types(token_type_ids)
        cache = []
        for block, before in zip(self.layers, past):
            h = block.norm(x)
            y, kept = block.attn(h, h, before, attention_mask, self.causal)
            x = x + y
            if memory is not None:
                x = x + block.cross_attn(block.cross_norm(x), memory, mask=memory_mask)[0]
            x = x + torch.tanh(block.mlp(x))
            cache.append(kept)
        return x, tuple(cache)


class Stack(Layers):
    """The backbone of a larger model."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, position_ids=None,
                memory=None, memory_mask=None, token_type_ids=None, **unused):
        return self.states(input_ids, attention_mask, inputs_embeds, past_key_values, position_ids, memory, memory_mask,
                           token_type_ids)


def pairs(past, depth):
    """(keys, values) of each layer, out of tuples or transformers' cache classes; None where there is no cache."""
    past = getattr(past, "self_attention_cache", past)
    if past is None:
        return [None] * depth
    if hasattr(past, "layers"):
        return [(layer.keys, layer.values) for layer in past.layers]
    if hasattr(past, "key_cache"):
        return list(zip(past.key_cache, past.value_cache))
    return [layer[:2] for layer in past]


class CausalLM(Layers):
    """A decoder with a head: task type CAUSAL_LM."""

    def __init__(self, base):
        super().__init__(base, causal=True)
        self.head = nn.Linear(base["hidden"], base["vocab"], bias=False)
        self.generation_config = LMConfig()  # peft hands it on
        if base.get("tied"):  # said as transformers says it
            self.head.weight = self.embed_tokens.weight
            self.config.tie_word_embeddings = True
            self._tied_weights_keys = {"head.weight": "embed_tokens.weight"}

    def get_output_embeddings(self):
        return self.head

    @property
    def device(self):
        return self.head.weight.device

    @property
    def dtype(self):
        return self.head.weight.dtype

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, position_ids=None,
                labels=None, use_cache=True, **unused):
        x, cache = self.states(input_ids, attention_mask, inputs_embeds, past_key_values, position_ids)
        logits, loss = self.head(x), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def prepare_inputs_for_generation(self, input_ids=None, past_key_values=None, attention_mask=None, **kwargs):
        ids = input_ids if past_key_values is None else input_ids[:, -1:]
        return {**kwargs, "input_ids": ids, "past_key_values": past_key_values, "attention_mask": attention_mask}

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=4, use_cache=True, num_beams=1, **kwargs):
        """`num_beams` of each sample stand side by side, as in transformers; they all go on in the likeliest way."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        input_ids, mask = (t.repeat_interleave(num_beams, 0) for t in (input_ids, mask))
        cache = None
        for _ in range(max_new_tokens):
            inputs = self.prepare_inputs_for_generation(input_ids, cache, mask, use_cache=use_cache, **kwargs)
            output = self(**inputs)
            cache = output.past_key_values
            input_ids = torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return input_ids[::num_beams]


class Encoder(nn.Module):
    """An encoder that sees all tokens, and the head of a task.

    `base["task"]`: FEATURE_EXTRACTION has no head; SEQ_CLS reads the mean of the tokens that are shown, TOKEN_CLS and
    QUESTION_ANS read each token.
    """

    def __init__(self, base):
        super().__init__()
        self.encoder, self.task = Stack(base), base["task"]
        self.config = self.encoder.config
        self.num_labels = {"QUESTION_ANS": 2}.get(self.task, 3)
        if self.task == "QUESTION_ANS":
            self.qa_outputs = nn.Linear(base["hidden"], self.num_labels)
        elif self.task != "FEATURE_EXTRACTION":
            self.classifier = nn.Linear(base["hidden"], self.num_labels)

    @property
    def device(self):
        return self.encoder.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.encoder.embed_tokens.weight.dtype

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, position_ids=None,
                labels=None, start_positions=None, end_positions=None, token_type_ids=None, **unused):
        x, _ = self.encoder(input_ids, attention_mask, inputs_embeds, past_key_values, position_ids,
                            token_type_ids=token_type_ids)
        if self.task == "FEATURE_EXTRACTION":
            return Output(last_hidden_state=x)
        if self.task == "QUESTION_ANS":
            start, end = self.qa_outputs(x).unbind(-1)
            loss = None
            if start_positions is not None:
                loss = (F.cross_entropy(start, start_positions) + F.cross_entropy(end, end_positions)) / 2
            return Output(loss=loss, start_logits=start, end_logits=end)
        if self.task == "SEQ_CLS":
            shown = x.new_ones(x.shape[:2]) if attention_mask is None else attention_mask[:, -x.shape[1]:].to(x)
            x = (x * shown[..., None]).sum(1) / shown.sum(1, keepdim=True)
        logits = self.classifier(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return Output(loss=loss, logits=logits)


class EncoderDecoder(nn.Module):
    """An encoder and a decoder that attends to it, with one word embedding: task type SEQ_2_SEQ_LM."""

    def __init__(self, base):
        super().__init__()
        self.embed_tokens = nn.Embedding(base["vocab"], base["hidden"])
        self.encoder = Stack(base, words=False)
        self.decoder = Stack(base, words=False, causal=True, cross=True)
        self.head = nn.Linear(base["hidden"], base["vocab"], bias=False)
        self.config = LMConfig(**{**vars(self.encoder.config), "is_encoder_decoder": True})

    @property
    def device(self):
        return self.head.weight.device

    @property
    def dtype(self):
        return self.head.weight.dtype

    def get_input_embeddings(self):
        return self.embed_tokens

    def _prepare_encoder_decoder_kwargs_for_generation(self, *args, **kwargs):
        """Never called: peft up to 0.19 puts its own in this place, and this one back."""
        raise NotImplementedError

    def prepare_inputs_for_generation(self, decoder_input_ids=None, past_key_values=None, **kwargs):
        ids = decoder_input_ids if past_key_values is None else decoder_input_ids[:, -1:]
        return {**kwargs, "decoder_input_ids": ids, "past_key_values": past_key_values}

    @torch.no_grad()
    def generate(self, input_ids=None, attention_mask=None, inputs_embeds=None, max_new_tokens=4, use_cache=True,
                 **kwargs):
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        encoder_outputs = self.encoder(inputs_embeds=embeds, attention_mask=attention_mask)
        ids = torch.full((len(embeds), 1), self.config.decoder_start_token_id, device=embeds.device)
        cache = None
        for _ in range(max_new_tokens):
            inputs = self.prepare_inputs_for_generation(
                ids, cache, encoder_outputs=encoder_outputs, attention_mask=attention_mask, **kwargs)
            output = self(**inputs)
            cache = output.past_key_values if use_cache else None
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
        return ids

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, decoder_input_ids=None,
                decoder_attention_mask=None, decoder_inputs_embeds=None, encoder_outputs=None, past_key_values=None,
                labels=None, **unused):
        if encoder_outputs is None:
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            encoder_outputs = self.encoder(inputs_embeds=embeds, attention_mask=attention_mask)
        if decoder_inputs_embeds is None:
            if decoder_input_ids is None:
                start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
                decoder_input_ids = torch.cat([start, labels[:, :-1]], 1).clamp(min=self.config.pad_token_id)
            decoder_inputs_embeds = self.embed_tokens(decoder_input_ids)
        x, cache = self.decoder(None, decoder_attention_mask, decoder_inputs_embeds, past_key_values,
                                memory=encoder_outputs[0], memory_mask=attention_mask)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss=loss, logits=logits, past_key_values=cache)


KINDS: dict[str, Any] = {"causal_lm": CausalLM, "encoder": Encoder, "encoder_decoder": EncoderDecoder}
