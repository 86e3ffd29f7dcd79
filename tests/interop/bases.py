"""The base models that cases adapt: small, seeded, with every kind of layer an adapter may sit on.

A `Base` knows how to build its model (float32, eval mode, equal on every call) and how to draw a batch for it.
transformers is imported only by the builders that need it.
"""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

BATCH = 4


@dataclass(frozen=True)
class Base:
    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], dict]  # generator -> keyword arguments of forward; the float ones get gradients
    transformers: bool = False
    float32_inside: bool = False  # computes partly in float32 whatever the dtype, so rounding shows at 1e-7

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = copied(_built(self.name, self.make), {})
        return model if dtype == torch.float32 else model.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 7) -> dict:
        drawn = self.draw(torch.Generator().manual_seed(seed))
        return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in drawn.items()}


PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, type)


def copied(module: nn.Module, memo: dict) -> nn.Module:
    """What `copy.deepcopy` gives, in a quarter of its time: most of a module is empty dictionaries and plain values."""
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        if isinstance(value, PLAIN):
            made = value
        elif name == "_modules":
            made = {child: m if m is None else copied(m, memo) for child, m in value.items()}
        elif not value and type(value) in (dict, set, list, OrderedDict):
            made = type(value)()
        else:
            made = copy.deepcopy(value, memo)
        vars(new)[name] = made
    return new


@functools.cache
def _built(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = make().eval()
        for p in model.parameters():  # biases and norm weights must not stay at 0 and 1
            p.data.add_(0.05 * torch.randn_like(p))
    return model


def floats(*shape: int, name: str = "x") -> Callable[[torch.Generator], dict]:
    return lambda g: {name: torch.randn(*shape, generator=g)}


def tokens(vocab: int, *shape: int, name: str = "x", **more) -> Callable[[torch.Generator], dict]:
    def draw(g):
        return {name: torch.randint(1, vocab, shape, generator=g), **{k: f(g) for k, f in more.items()}}

    return draw


class Chain(nn.Module):
    """Named modules applied in order, with tanh between them."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.order = list(modules)

    def forward(self, x, **kwargs):
        for i, name in enumerate(self.order):
            x = self.get_submodule(name)(x) if i == 0 else self.get_submodule(name)(torch.tanh(x))
        return x


def _mlp():
    return Chain(square=nn.Linear(8, 8), wide=nn.Linear(8, 12), thin=nn.Linear(12, 4, bias=False), head=nn.Linear(4, 3))


def _conv(kind: type[nn.Module], groups: int = 1):
    def make():
        return Chain(
            first=kind(4, 6, 3, stride=2, padding=1, groups=groups),
            same=kind(6, 6, 3, padding=1, bias=False, groups=groups),
            point=kind(6, 4, 1, groups=groups),
        )

    return make


def _dilated(kind: type[nn.Module]):
    return lambda: Chain(first=kind(4, 6, 3, dilation=2, stride=2, padding=1), point=kind(6, 4, 1))


def _conv2d_uneven():
    return Chain(first=nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1)), point=nn.Conv2d(6, 4, 1))


def _pointwise():
    return Chain(first=nn.Conv2d(4, 8, 1, stride=2), same=nn.Conv2d(8, 8, 1, bias=False))


def _embedding(**options):
    def make():
        return Chain(emb=nn.Embedding(20, 8, **options), lin=nn.Linear(8, 6))

    return make


def _conv1d_hf():
    from transformers.pytorch_utils import Conv1D

    return Chain(square=Conv1D(8, 8), wide=Conv1D(12, 8), thin=Conv1D(4, 12), head=nn.Linear(4, 3))


class Attention(nn.Module):
    def __init__(self, bias=True, batch_first=True):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first)
        self.lin = nn.Linear(8, 6)

    def forward(self, x):
        return self.lin(self.attn(x, x.roll(1, -1), x.flip(-1), need_weights=False)[0])


class Bare(nn.Module):
    """A weight that is no layer's: y = x W^T."""

    def __init__(self, inp=8, out=6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inp))

    def forward(self, x):
        return x @ self.weight.transpose(0, 1)


class Experts(nn.Module):
    """Every token goes through all experts and their mean is returned: up (e, i, h), down (e, h, i)."""

    def __init__(self, experts=3, hidden=8, inter=6):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, inter, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, inter))

    def forward(self, x):
        up, down = self.up, self.down
        y = torch.tanh(torch.einsum("bth,eih->beti", x, up))
        return torch.einsum("beti,ehi->bth", y, down) / up.shape[0]


def _bare():
    return Chain(bare=Bare(), lin=nn.Linear(6, 4))


def _experts():
    return Chain(moe=Experts(), lin=nn.Linear(8, 4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q = nn.Linear(8, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.q(self.norm(x)))))


class Stack(nn.Module):
    """Four equal blocks under `layers`, an embedding before and a head behind: a decoder without attention."""

    def __init__(self, tied=False):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, x, **kwargs):
        x = self.emb(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _norms():
    return Chain(
        lin=nn.Linear(8, 6), ln=nn.LayerNorm(6), wide=nn.Linear(6, 10), plain=nn.LayerNorm(10, bias=False),
        head=nn.Linear(10, 3),
    )


MLP = Base("mlp", _mlp, floats(BATCH, 3, 8))
MLP_2D = Base("mlp2d", _mlp, floats(BATCH, 8))
CONV1D = Base("conv1d", _conv(nn.Conv1d), floats(BATCH, 4, 9))
CONV2D = Base("conv2d", _conv(nn.Conv2d), floats(BATCH, 4, 9, 7))
CONV3D = Base("conv3d", _conv(nn.Conv3d), floats(BATCH, 4, 5, 6, 5))
CONV1D_GROUPS = Base("conv1d_groups", _conv(nn.Conv1d, 2), floats(BATCH, 4, 9))
CONV2D_GROUPS = Base("conv2d_groups", _conv(nn.Conv2d, 2), floats(BATCH, 4, 9, 7))
CONV3D_GROUPS = Base("conv3d_groups", _conv(nn.Conv3d, 2), floats(BATCH, 4, 5, 6, 5))
CONV2D_UNEVEN = Base("conv2d_uneven", _conv2d_uneven, floats(BATCH, 4, 7, 8))
CONV1D_DILATED = Base("conv1d_dilated", _dilated(nn.Conv1d), floats(BATCH, 4, 9))
CONV2D_DILATED = Base("conv2d_dilated", _dilated(nn.Conv2d), floats(BATCH, 4, 9, 7))
CONV3D_DILATED = Base("conv3d_dilated", _dilated(nn.Conv3d), floats(BATCH, 4, 7, 6, 5))
POINTWISE = Base("pointwise", _pointwise, floats(BATCH, 4, 5, 5))
EMBEDDING = Base("embedding", _embedding(), tokens(20, BATCH, 5))
EMBEDDING_PAD = Base("embedding_pad", _embedding(padding_idx=3), tokens(20, BATCH, 5))
HF_CONV1D = Base("hf_conv1d", _conv1d_hf, floats(BATCH, 3, 8), transformers=True)
ATTENTION = Base("attention", Attention, floats(BATCH, 3, 8))
ATTENTION_NO_BIAS = Base("attention_no_bias", functools.partial(Attention, bias=False), floats(BATCH, 3, 8))
ATTENTION_SEQ_FIRST = Base("attention_seq", functools.partial(Attention, batch_first=False), floats(3, BATCH, 8))
BARE = Base("bare", _bare, floats(BATCH, 3, 8))
EXPERTS = Base("experts", _experts, floats(BATCH, 3, 8))
STACK = Base("stack", Stack, tokens(20, BATCH, 5))
NORMS = Base("norms", _norms, floats(BATCH, 3, 8))


# ---------------------------------------------------------------------------------------------- transformers models
VOCAB = 30


def _hf(config: str, model: str, **options):
    def make():
        import transformers

        made = getattr(transformers, config)(**options)
        made._attn_implementation = "eager"
        return getattr(transformers, model)(made)

    return make


_BERT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
_T5 = {
    "vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}


def _mask(g):
    mask = torch.ones(BATCH, 5, dtype=torch.long)
    mask[1, 4:] = 0
    return mask


def _ids(*shape, high=VOCAB):
    return lambda g: torch.randint(3, high, shape, generator=g)


def _text(**more):
    return tokens(VOCAB, BATCH, 5, name="input_ids", attention_mask=_mask, **more)


def _hf_base(name, make, draw):
    return Base(name, make, draw, transformers=True, float32_inside=not name.startswith("bert"))


BERT = _hf_base("bert", _hf("BertConfig", "BertModel", **_BERT), _text())
BERT_SEQ = _hf_base("bert_seq", _hf("BertConfig", "BertForSequenceClassification", **_BERT),
                    _text(labels=lambda g: torch.randint(0, 3, (BATCH,), generator=g)))
BERT_TOKEN = _hf_base("bert_token", _hf("BertConfig", "BertForTokenClassification", **_BERT),
                      _text(labels=lambda g: torch.randint(0, 3, (BATCH, 5), generator=g)))
BERT_QA = _hf_base("bert_qa", _hf("BertConfig", "BertForQuestionAnswering", **{**_BERT, "num_labels": 2}),
                   _text(start_positions=lambda g: torch.randint(0, 4, (BATCH,), generator=g),
                         end_positions=lambda g: torch.randint(0, 4, (BATCH,), generator=g)))
BERT_TOKEN_BARE = _hf_base("bert_token_bare", _hf("BertConfig", "BertForTokenClassification", **_BERT), _text())
GPT2 = _hf_base("gpt2", _hf("GPT2Config", "GPT2LMHeadModel", **_GPT2), _text(labels=_ids(BATCH, 5)))
GPT2_SEQ = _hf_base("gpt2_seq", _hf("GPT2Config", "GPT2ForSequenceClassification", num_labels=3, **_GPT2),
                    _text(labels=lambda g: torch.randint(0, 3, (BATCH,), generator=g)))
VIT = _hf_base("vit", _hf("ViTConfig", "ViTForImageClassification", hidden_size=16, intermediate_size=24,
                          num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4, num_labels=3),
               lambda g: {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=g),
                          "labels": torch.randint(0, 3, (BATCH,), generator=g)})
T5 = _hf_base("t5", _hf("T5Config", "T5ForConditionalGeneration", **_T5),
              _text(labels=_ids(BATCH, 4), decoder_input_ids=_ids(BATCH, 4)))
LLAMA = _hf_base("llama", _hf("LlamaConfig", "LlamaForCausalLM", **_LLAMA), _text(labels=_ids(BATCH, 5)))
LLAMA_TIED = _hf_base("llama_tied", _hf("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True, **_LLAMA),
                      _text(labels=_ids(BATCH, 5)))
_GROUPED = {**_LLAMA, "num_key_value_heads": 1}
LLAMA_GROUPED = _hf_base("llama_grouped", _hf("LlamaConfig", "LlamaForCausalLM", **_GROUPED),
                         _text(labels=_ids(BATCH, 5)))
LLAMA_BARE = _hf_base("llama_bare", _hf("LlamaConfig", "LlamaModel", **_LLAMA), _text())
LLAMA_SEQ = _hf_base("llama_seq", _hf("LlamaConfig", "LlamaForSequenceClassification", num_labels=3, **_LLAMA),
                     _text(labels=lambda g: torch.randint(0, 3, (BATCH,), generator=g)))
MISTRAL = _hf_base("mistral", _hf("MistralConfig", "MistralForCausalLM", **_GROUPED), _text(labels=_ids(BATCH, 5)))
LLAMA_DEEP = _hf_base("llama_deep", _hf("LlamaConfig", "LlamaForCausalLM", **{**_LLAMA, "num_hidden_layers": 3}),
                      _text(labels=_ids(BATCH, 5)))
QWEN3 = _hf_base("qwen3", _hf("Qwen3Config", "Qwen3ForCausalLM", head_dim=8, **_LLAMA), _text(labels=_ids(BATCH, 5)))
GEMMA3 = _hf_base("gemma3", _hf("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, sliding_window=3, **_LLAMA),
                  _text(labels=_ids(BATCH, 5)))
_OPT = {
    "vocab_size": VOCAB, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "word_embed_proj_dim": 16, "max_position_embeddings": 40, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = _hf_base("opt", _hf("OPTConfig", "OPTForCausalLM", **_OPT), _text(labels=_ids(BATCH, 5)))
ROBERTA = _hf_base("roberta", _hf("RobertaConfig", "RobertaForSequenceClassification", pad_token_id=1, **_BERT),
                   _text(labels=lambda g: torch.randint(0, 3, (BATCH,), generator=g)))
DEBERTA = _hf_base("deberta", _hf("DebertaV2Config", "DebertaV2ForSequenceClassification", pad_token_id=0, **_BERT),
                   _text(labels=lambda g: torch.randint(0, 3, (BATCH,), generator=g)))
_BART = {
    "vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40,
    "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
}
BART = _hf_base("bart", _hf("BartConfig", "BartForConditionalGeneration", **_BART),
                _text(labels=_ids(BATCH, 4), decoder_input_ids=_ids(BATCH, 4)))
