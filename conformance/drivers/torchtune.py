"""torchtune: https://github.com/pytorch/torchtune; LoRA and DoRA of linear layers.

What differs from PEFT, and is seen or declared: DoRA scales the layer's bias along with its weight; there is no rsLoRA;
merging is a function on state dicts, `get_merged_lora_ckpt`, for checkpoints to be used without torchtune, so nothing
is unmerged.
"""

from __future__ import annotations

from importlib.metadata import version

from torch import nn
from torchtune.modules.peft import DoRALinear, LoRALinear, disable_adapter, get_merged_lora_ckpt

from .. import models
from ..driver import Unsupported
from .layers import LayerDriver, same


class TorchTune(LayerDriver):
    methods = {"LORA"}
    fields = {"r", "lora_alpha", "use_dora"}

    def info(self):
        return {"name": "torchtune", "version": version("torchtune"), "dtypes": ["float64", "float32", "bfloat16"],
                "mapped_keys": True}

    def build(self, base, weights, config, dtype, case="", seed=0):
        self.base, self.config, self.disabled = base, config, []
        super().build(base, weights, config, dtype, case, seed)

    def adapt(self, name, parent, last, layer, config):
        if not isinstance(layer, nn.Linear):
            raise Unsupported(f"no {type(layer).__name__}")
        kind = DoRALinear if config.get("use_dora") else LoRALinear
        new = kind(layer.in_features, layer.out_features, config["r"], config.get("lora_alpha", 8),
                   use_bias=layer.bias is not None).to(self.dtype)
        new.load_state_dict(layer.state_dict(), strict=False)
        if config.get("use_dora"):
            new.initialize_dora_magnitude()
        new.requires_grad_(False)
        for key in new.adapter_params():
            new.get_parameter(key).requires_grad_(True)
        setattr(parent, last, new)
        return new

    def parameters(self, layer):
        found = {"lora_A.weight": (layer.lora_a.weight, same, same), "lora_B.weight": (layer.lora_b.weight, same, same)}
        if isinstance(layer, DoRALinear):
            found["lora_magnitude_vector"] = (layer.magnitude, same, same)
        return found

    def disable(self, off):
        if off:
            self.disabled.append(disable_adapter(self.net))
            self.disabled[-1].__enter__()
        else:
            self.disabled.pop().__exit__(None, None, None)

    def merge(self, names=None):
        """For good: the merged checkpoint, in the base model."""
        state = {k: v.clone() for k, v in self.net.state_dict().items()}
        merged = get_merged_lora_ckpt(state, self.config["r"], self.config.get("lora_alpha", 8))
        self.net, self.handles = models.make(self.base).to(self.dtype), {}
        self.net.load_state_dict(merged)
