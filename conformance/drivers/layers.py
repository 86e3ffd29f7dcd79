"""What drivers of layer-level libraries share: they replace or wrap single layers and know no PEFT names.

A subclass says how one layer is adapted (`adapt`), which of its parameters stands for which of PEFT's tensors
(`parameters`), and how it merges. Saved keys are the driver's mapping, so they are not checked as the library's own.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from .. import models
from ..driver import Driver, Unsupported
from ..reference.method import KEY
from .peft_api import to_numpy, to_torch


def same(t):
    return t


class LayerDriver(Driver):
    # config fields the library has a counterpart for; any other field with a value is unsupported
    fields: set = set()
    methods: set = set()

    def adapt(self, name, parent, last, layer, config):
        """Adapt one layer in place; returns a handle for the other methods."""
        raise NotImplementedError

    def parameters(self, handle) -> dict:
        """PEFT's slot -> (parameter, to PEFT's value, from PEFT's value)."""
        raise NotImplementedError

    def build(self, base, weights, config, dtype, case="", seed=0):
        if base.get("model"):
            raise Unsupported("layers only, no language model")
        if "output" in base:
            raise Unsupported("layers only, no model that names its output layer")
        self.dtype, self.off, self.merged = models.DTYPES[dtype], False, False
        models.seed(seed)
        self.net = models.make(base).to(self.dtype)
        self.net.load_state_dict({k: to_torch(v, self.dtype) for k, v in weights.items()})
        self.net.requires_grad_(False)
        self.base_names = list(weights)
        self.handles = {}
        if config is not None:
            self.check(config)
            self.build_adapters(config)

    def check(self, config):
        if config["peft_type"] not in self.methods:
            raise Unsupported(f"no {config['peft_type']}")
        extra = {k for k, v in config.items() if k not in self.fields
                 and (v not in (None, False, [], {}, "none") or (v is False and k.startswith("init_")))}
        if extra - {"peft_type", "target_modules", "fan_in_fan_out"}:
            raise Unsupported(f"no counterpart of {', '.join(sorted(extra))}")
        if not isinstance(config.get("target_modules"), list):
            raise Unsupported("targets by list only")
        if "r" in config and (not isinstance(config["r"], int) or config["r"] < 1):
            raise Unsupported("ranks are not checked")

    def build_adapters(self, config):
        for name, module in list(self.net.named_modules()):
            if name and (name in config["target_modules"] or name.split(".")[-1] in config["target_modules"]):
                path, _, last = name.rpartition(".")
                self.handles[name] = self.adapt(name, self.net.get_submodule(path), last, module, config)
        if not self.handles:
            raise Unsupported("choosing layers is this driver's, not the library's")

    def tensors(self):
        return {f"{KEY}{name}.{slot}": entry for name, handle in self.handles.items()
                for slot, entry in self.parameters(handle).items()}

    def load(self, tensors, name="default"):
        own = self.tensors()
        if set(own) != set(tensors) or any(own[k][1](own[k][0]).shape != tensors[k].shape for k in own) \
                or not all(np.isfinite(v).all() for v in tensors.values()):
            raise Unsupported("loading is this driver's, so what it refuses says nothing about the library")
        for k, v in tensors.items():
            parameter, _, inward = own[k]
            parameter.data.copy_(inward(to_torch(v, self.dtype)))

    def state_dict(self, name="default"):
        return {k: to_numpy(outward(p)) for k, (p, outward, _) in self.tensors().items()}

    def run(self, inputs):
        return self.net(to_torch(inputs["x"], self.dtype) if not torch.is_tensor(inputs["x"]) else inputs["x"])

    def forward(self, inputs, adapter_names=None):
        if adapter_names is not None:
            raise Unsupported("mixed batches")
        if self.off:
            raise Unsupported("disable adapters")
        with torch.no_grad():
            return to_numpy(self.run(inputs))

    def gradients(self, inputs, cotangent):
        x = to_torch(inputs["x"], self.dtype)
        if x.is_floating_point():
            x.requires_grad_(True)
        self.net.zero_grad()
        (self.run({"x": x}) * to_torch(cotangent, self.dtype)).sum().backward()
        found = {"input": to_numpy(x.grad)} if x.is_floating_point() else {}
        for k, (p, outward, _) in self.tensors().items():
            # An affine map of the values; its linear part maps the gradient.
            zero = torch.zeros_like(p)
            found[k] = to_numpy(outward(zero if p.grad is None else p.grad) - outward(zero))
        return found

    def weights(self):
        return {n: to_numpy(self.base_parameter(n)) for n in self.base_names}

    def base_parameter(self, name):
        return self.net.get_parameter(name)

    def copy(self):
        self.net, self.handles = copy.deepcopy((self.net, self.handles))
