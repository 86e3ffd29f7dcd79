"""A stack of plain modules with the shape of a Llama decoder: seven linear layers in each block."""

import torch
from torch import nn
from torch.nn import functional as F

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Attention(nn.Module):
    def __init__(self, width: int, head: int = 64):
        super().__init__()
        self.head = head
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):  # (batch, time, width)
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, time, head)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width)
        self.self_attn = Attention(width)
        self.post_attention_layernorm = nn.RMSNorm(width)
        self.mlp = MLP(width, inner)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """`layers` blocks over hidden states x (batch, time, width)."""

    def __init__(self, layers: int, width: int, inner: int):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(layers))

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def stack(layers: int, width: int, inner: int, device: str) -> Stack:
    """The stack, frozen values drawn at seed 0, on a device ("cpu", "cuda" or "meta")."""
    torch.manual_seed(0)
    with torch.device(device):
        return Stack(layers, width, inner)
