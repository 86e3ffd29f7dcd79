"""The classifier of X-LoRA: from the hidden states of a token to its weights for each layer and adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import BatchError


class XLoraClassifier(nn.Module):
    """C, with the log of what it has said. `override_scaling_pass_value` is the weight that stands for it before."""

    def __init__(self, config: Any, n_classes: int, n_layers: int, dtype: torch.dtype, device: Any):
        super().__init__()
        self.config, self.n_classes, self.n_layers = config, n_classes, n_layers
        self.scalings_logging = False
        self.log_scalings: list[Tensor] = []
        self.override_scaling_pass_value = config.scaling_pass_value
        layers: list[nn.Module] = []
        width = config.hidden_size
        for _ in range(config.xlora_depth - 1):
            layers += [nn.Linear(width, config.xlora_size), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                layers.append(nn.Dropout(config.xlora_dropout_p))
            width = config.xlora_size
        layers.append(nn.Linear(width, n_classes * (n_layers if config.layerwise_scalings else 1)))
        self.layers = nn.Sequential(*layers).to(device, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """p (batch, length, layers, adapters) for hidden states (batch, length, hidden_size)."""
        c = self.config
        if hidden.dim() != 3 or hidden.shape[-1] != c.hidden_size:
            shape = tuple(hidden.shape)
            raise BatchError(f"hidden_size is {c.hidden_size}, but the model's last hidden states are {shape}.")
        logits = self.layers(hidden).unflatten(-1, (-1, self.n_classes))  # (batch, length, layers or 1, adapters)
        logits = logits.expand(-1, -1, self.n_layers, -1)
        scalings = torch.softmax(logits / c.softmax_temperature, -1) if c.enable_softmax else logits
        if self.scalings_logging:
            self.log_scalings.append(scalings.detach())
        return scalings

    def constant(self) -> Tensor:
        """What the first pass has in place of p: (1, 1, layers, adapters)."""
        value, like = self.override_scaling_pass_value, next(self.parameters())
        return like.new_full((1, 1, self.n_layers, self.n_classes), value)

    def weights(self, scalings: Tensor) -> Tensor:
        """g p, of the same shape, with the smaller p set to 0 if only `top_k_lora` are kept."""
        c = self.config
        if c.top_k_lora is not None:
            kept = torch.zeros_like(scalings, dtype=torch.bool)
            kept.scatter_(-1, torch.topk(scalings, c.top_k_lora, -1).indices, True)
            scalings = scalings * kept
        if c.enable_softmax_topk:  # PEFT: a p that is kept and 0 counts as not kept
            out = scalings == 0
            scalings = torch.softmax(scalings.masked_fill(out, -torch.inf), -1).masked_fill(out, 0.0)
        return scalings * c.global_scaling_weight
