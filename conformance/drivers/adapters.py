"""AdapterHub's adapters: https://github.com/adapter-hub/adapters; LoRA, DoRA and (IA)^3 of linear layers.

What differs from PEFT, and is seen or declared: no rsLoRA; (IA)^3 acts on outputs alone; DoRA takes the norm of W + B A
without the scale, differentiates through it and scales the layer's bias; what is merged with DoRA stays merged.
"""

from __future__ import annotations

import adapters
import torch
from adapters import IA3Config, LoRAConfig, ModelAdaptersConfig
from adapters.composition import Stack
from adapters.methods.lora import IA3, LoRALinear
from torch import nn

from ..driver import Unsupported
from .layers import LayerDriver, same
from .peft_api import to_torch

NAME, PLACE = "default", "intermediate"


class AdapterHub(LayerDriver):
    methods = {"LORA", "IA3"}
    fields = {"r", "lora_alpha", "use_dora"}

    def info(self):
        return {"name": "adapters", "version": adapters.__version__, "dtypes": ["float64", "float32", "bfloat16"],
                "mapped_keys": True}

    def build_adapters(self, config):
        kind, more = IA3Config, {}
        if config["peft_type"] == "LORA":
            kind, more = LoRAConfig, {"r": config["r"], "alpha": config.get("lora_alpha", 8),
                                      "use_dora": config.get("use_dora", False)}
        self.registry = ModelAdaptersConfig()
        self.registry.add(NAME, kind(**{f"{PLACE}_lora": True}, dtype=str(self.dtype).removeprefix("torch."), **more))
        self.registry.active_setup = Stack(NAME)
        super().build_adapters(config)

    def adapt(self, name, parent, last, layer, config):
        if not isinstance(layer, nn.Linear):
            raise Unsupported(f"no {type(layer).__name__}")
        new = LoRALinear.wrap(layer, PLACE, None, self.registry)
        new.add_adapter(NAME, 0)
        new.loras.to(self.dtype).requires_grad_(True)
        setattr(parent, last, new)
        return new

    def parameters(self, layer):
        lora = layer.loras[NAME]
        if isinstance(lora, IA3):
            return {"ia3_l": (lora.lora_B, same, same)}
        found = {"lora_A.weight": (lora.lora_A, same, same), "lora_B.weight": (lora.lora_B, same, same)}
        if lora.use_dora:
            found["lora_magnitude_vector"] = (lora.m.weight, torch.ravel, lambda m: m.reshape(-1, 1))
        return found

    def run(self, inputs):
        """It is made for inputs of (batch, tokens, features)."""
        x = inputs["x"] if torch.is_tensor(inputs["x"]) else to_torch(inputs["x"], self.dtype)
        return self.net(x.unsqueeze(1)).squeeze(1) if x.dim() == 2 else self.net(x)

    def merge(self, names=None):
        for layer in self.handles.values():
            layer.merge_adapter(NAME)

    def unmerge(self):
        for layer in self.handles.values():
            layer.reset_adapter()

    def disable(self, off):
        self.registry.active_setup = None if off else Stack(NAME)

    def copy(self):
        raise Unsupported("layers share the registry of their model, which is this driver's")
