"""loralib, the LoRA authors' own library: https://github.com/microsoft/LoRA.

What differs from PEFT, and is declared: no rsLoRA, no bias in B, no patterns; its convolutions factorise the flattened
kernel, (out k, r k) times (r k, in k), so PEFT's tensors do not fit them; merging happens by leaving training mode.
"""

from __future__ import annotations

from importlib.metadata import version

import loralib
from torch import nn

from ..driver import Unsupported
from .layers import LayerDriver, same


class LoraLib(LayerDriver):
    methods = {"LORA"}
    fields = {"r", "lora_alpha"}

    def info(self):
        return {"name": "loralib", "version": version("loralib"), "dtypes": ["float64", "float32", "bfloat16"],
                "mapped_keys": True}

    def adapt(self, name, parent, last, layer, config):
        more = {"r": config["r"], "lora_alpha": config.get("lora_alpha", 8)}
        if isinstance(layer, nn.Linear):
            new = loralib.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, **more)
        elif type(layer) is nn.Embedding:
            new = loralib.Embedding(layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx, **more)
        elif type(layer).__name__ == "Conv1D":
            new = loralib.Linear(*layer.weight.shape, fan_in_fan_out=True, **more)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise Unsupported("its convolutions factorise the kernel in another way: (out k, r k) x (r k, in k)")
        else:
            raise Unsupported(f"no {type(layer).__name__}")
        new = new.to(self.dtype)
        new.load_state_dict(layer.state_dict(), strict=False)
        new.weight.requires_grad_(False)
        if getattr(new, "bias", None) is not None:
            new.bias.requires_grad_(False)
        setattr(parent, last, new)
        self.net.train()  # running unmerged
        return new

    def parameters(self, layer):
        a, b = ("lora_embedding_A", "lora_embedding_B") if isinstance(layer, nn.Embedding) else \
            ("lora_A.weight", "lora_B.weight")
        return {a: (layer.lora_A, same, same), b: (layer.lora_B, same, same)}

    def merge(self, names=None):
        self.net.eval()

    def unmerge(self):
        self.net.train()
