"""Tiny decoders in torch whose attention and blocks are modules, for methods that go around those as a whole.

They have the names of Llama or of GPT-2: rotated queries that share keys and values there, one layer for queries, keys
and values here. Each can be made anew from a config, as the smaller ones that Shadow puts beside them are.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .language_models import LMConfig, Output
from .layers import conv1d


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, d = config.hidden_size, config.head_dim
        self.config, self.head_dim = config, d
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, hidden, bias=False)

    def forward(self, hidden_states, position_embeddings):
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (t[:, None] for t in position_embeddings)
        q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


class GPT2Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        kind = conv1d()
        self.config, self.head_dim, self.split_size = config, config.head_dim, config.hidden_size
        self.c_attn, self.c_proj = kind(3 * config.hidden_size, config.hidden_size), kind(*[config.hidden_size] * 2)

    def forward(self, hidden_states, **unused):
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for t in self.c_attn(hidden_states).split(self.split_size, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2)), None


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(config.hidden_size), LlamaAttention(config)
        self.mlp = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, position_embeddings):
        h = self.norm(hidden_states)
        x = hidden_states + self.self_attn(hidden_states=h, position_embeddings=position_embeddings)[0]
        return x + torch.tanh(self.mlp(x))


class GPT2Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(config.hidden_size), GPT2Attention(config)
        self.mlp = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, position_embeddings):
        x = hidden_states + self.attn(hidden_states=self.norm(hidden_states))[0]
        return x + torch.tanh(self.mlp(x))


class Decoder(nn.Module):
    """Word embedding, blocks, norm: hidden states for words."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        block = {"llama": LlamaBlock, "gpt2": GPT2Block}[config.model_type]
        blocks = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        setattr(self, {"llama": "layers", "gpt2": "h"}[config.model_type], blocks)
        self.norm = nn.LayerNorm(config.hidden_size)

    @property
    def blocks(self):
        return self.layers if hasattr(self, "layers") else self.h

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, use_cache=None,
                return_dict=None):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        places = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
        d = self.config.head_dim
        angles = places[:, None] * 10.0 ** (-torch.arange(d // 2, device=x.device, dtype=torch.float64) * 2 / d)
        angles = torch.cat([angles, angles], -1)[None]
        turn = angles.cos().to(x), angles.sin().to(x)
        for block in self.blocks:
            x = block(x, position_embeddings=turn)  # what a block returns is for the next one only
        return Output(last_hidden_state=self.norm(x), past_key_values=None)


class DecoderLM(nn.Module):
    """The same with a head: task type CAUSAL_LM."""

    def __init__(self, base):
        super().__init__()
        heads, hidden = base["heads"], base["hidden"]
        self.config = LMConfig(
            vocab_size=base["vocab"], hidden_size=hidden, num_attention_heads=heads, model_type=base["names"],
            num_key_value_heads=base.get("kv_heads", heads), head_dim=hidden // heads, num_hidden_layers=base["depth"],
            tie_word_embeddings=False, is_encoder_decoder=False)
        self.model = Decoder(copy.copy(self.config))
        self.head = nn.Linear(hidden, base["vocab"], bias=False)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.head

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return kwargs

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **unused):
        logits, loss = self.head(self.model(input_ids, attention_mask, inputs_embeds).last_hidden_state), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(logits=logits, loss=loss)
