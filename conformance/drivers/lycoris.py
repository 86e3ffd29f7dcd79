"""LyCORIS: https://github.com/KohakuBlueleaf/LyCORIS, package lycoris-lora; LoCon as LoRA and DoRA, and (IA)^3.

What differs from PEFT, and is seen or declared: DoRA differentiates through the norm (PEFT holds it constant); (IA)^3
stores l - 1 and leaves the base bias unscaled; its OFT rotates the output, PEFT's the input, so it is not compared.
"""

from __future__ import annotations

from importlib.metadata import version

from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from torch import nn

from ..driver import Unsupported
from .layers import LayerDriver, same

KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Lycoris(LayerDriver):
    methods = {"LORA", "IA3"}
    fields = {"r", "lora_alpha", "use_rslora", "use_dora", "feedforward_modules"}

    def info(self):
        return {"name": "lycoris", "version": version("lycoris-lora"), "dtypes": ["float64", "float32", "bfloat16"],
                "mapped_keys": True}

    def adapt(self, name, parent, last, layer, config):
        if not isinstance(layer, KNOWN):
            raise Unsupported(f"no {type(layer).__name__}")
        if config["peft_type"] == "IA3":
            on_input = last in config.get("feedforward_modules", [])
            module = IA3Module(name.replace(".", "_"), layer, train_on_input=on_input)
        else:
            if getattr(layer, "groups", 1) > 1:
                raise Unsupported("for grouped convolutions its A sees one group's channels, PEFT's all")
            module = LoConModule(name.replace(".", "_"), layer, lora_dim=config["r"],
                                 alpha=config.get("lora_alpha", 8), rs_lora=config.get("use_rslora", False),
                                 weight_decompose=config.get("use_dora", False))
        module = module.to(self.dtype).eval()
        module.apply_to()
        return module

    def parameters(self, module):
        if isinstance(module, IA3Module):
            shape = module.weight.shape
            column = len(shape) == 1 and not module.train_input
            outside = (*shape, 1) if column else (1, *shape) if len(shape) == 1 else tuple(shape)
            return {"ia3_l": (module.weight, lambda w: (w + 1).reshape(outside), lambda w: w.reshape(shape) - 1)}
        found = {"lora_A.weight": (module.lora_down.weight, same, same),
                 "lora_B.weight": (module.lora_up.weight, same, same)}
        if module.wd:
            scale = module.dora_scale
            out = scale.shape[0]
            outside = (1, *scale.shape[:1], *scale.shape[2:]) if scale.dim() > 2 else (out,)
            found["lora_magnitude_vector"] = (scale, lambda w: w.reshape(outside), lambda w: w.reshape(scale.shape))
        return found

    def merge(self, names=None):
        for module in self.handles.values():
            module.onfly_merge()
            module.restore()

    def unmerge(self):
        for module in self.handles.values():
            module.onfly_restore()
            module.apply_to()

    def disable(self, off):
        for module in self.handles.values():
            module.restore() if off else module.apply_to()

    def copy(self):
        raise Unsupported("a wrapped layer's forward is bound to the original wrapper")
