"""rsLoRA: LoRA's scale is alpha / r. For the change to keep its size as r grows, it has to be another."""

import torch
from torch import nn


class LoraLinear(nn.Module):
    """A frozen linear layer with A and B beside it, as in the first chapter."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.scale = alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


class RsLoraLinear(LoraLinear):
    """The same with the scale of rsLoRA."""
