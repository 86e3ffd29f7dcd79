"""A LoRA implementation in NumPy, of linear layers alone, as a program that the suite can check:

    python -m conformance --impl "cmd:python conformance/examples/numpy_lora.py" --methods lora

It imports nothing of the suite and no torch, so it shows what a port to any language has to write.
"""

import json
import math
import os
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = tempfile.mkdtemp()
PREFIX = "base_model.model."
SUPPORTED = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"}


class Unsupported(Exception):
    pass


class Model:
    def build(self, base, weights, config, dtype, case="", seed=0):
        kinds = {kind for _, kind, _ in base.get("layers", [[None, "a language model", None]])}
        if not kinds <= {"Linear", "Tanh"}:
            raise Unsupported(f"only linear layers, not {sorted(kinds - {'Linear', 'Tanh'})}")
        self.type = np.float64 if dtype == "float64" else np.float32
        self.layers = [(name, kind) for name, kind, _ in base["layers"]]
        self.W = {k: v.astype(self.type) for k, v in weights.items()}
        self.merged = self.off = False
        self.adapter = {}
        self.config = config
        if config is None:
            return
        extra = {k for k, v in config.items() if k not in SUPPORTED and (v or k == "init_lora_weights")}
        if config["peft_type"] != "LORA" or extra or not isinstance(config.get("target_modules"), list):
            raise Unsupported(f"plain LoRA only, not {sorted(extra) or config['peft_type']}")
        r = config["r"]
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r must be a positive integer, not {r!r}")
        draw = np.random.default_rng(seed)
        for name, kind in self.layers:
            if kind == "Linear" and any(f".{name}".endswith(f".{target}") for target in config["target_modules"]):
                out, into = self.W[name + ".weight"].shape
                A = draw.uniform(-1, 1, (r, into)) / math.sqrt(into)
                self.adapter[f"{PREFIX}{name}.lora_A.weight"] = A.astype(self.type)
                self.adapter[f"{PREFIX}{name}.lora_B.weight"] = np.zeros((out, r), self.type)
        if not self.adapter:
            raise ValueError("target_modules match no layer")

    def load(self, tensors, name="default"):
        if set(tensors) != set(self.adapter):
            raise ValueError(f"keys differ: {sorted(set(tensors) ^ set(self.adapter))}")
        for k, v in tensors.items():
            if v.shape != self.adapter[k].shape or not np.isfinite(v).all():
                raise ValueError(f"{k}: wrong shape, or not finite")
        self.adapter = {k: v.astype(self.type) for k, v in tensors.items()}

    def scaled_pair(self, layer):
        A, B = (self.adapter.get(f"{PREFIX}{layer}.lora_{x}.weight") for x in "AB")
        r, alpha = self.config["r"], self.config.get("lora_alpha", 8)
        return A, B, alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def forward(self, inputs, adapter_names=None):
        if adapter_names is not None:
            raise Unsupported("mixed batches")
        x = inputs["x"].astype(self.type)
        for name, kind in self.layers:
            if kind == "Tanh":
                x = np.tanh(x)
                continue
            y = x @ self.W[name + ".weight"].T + self.W.get(name + ".bias", 0)
            if f"{PREFIX}{name}.lora_A.weight" in self.adapter and not self.merged and not self.off:
                A, B, s = self.scaled_pair(name)
                y = y + s * (x @ A.T @ B.T)
            x = y
        return x

    def change(self, sign):
        for name, _ in self.layers:
            if f"{PREFIX}{name}.lora_A.weight" in self.adapter:
                A, B, s = self.scaled_pair(name)
                self.W[name + ".weight"] = self.W[name + ".weight"] + sign * self.type(s) * (B @ A)

    def merge(self, names=None):
        self.before = dict(self.W)
        self.change(+1)
        self.merged = True

    def unmerge(self):
        self.W, self.merged = self.before, False

    def disable(self, off):
        self.off = off

    def weights(self):
        return dict(self.W)

    def state_dict(self, name="default"):
        return dict(self.adapter)

    def info(self):
        return {"name": "numpy-lora", "version": "1", "dtypes": ["float64", "float32"]}


def read(value):
    if isinstance(value, dict) and set(value) in ({"tensors"}, {"array"}):
        path = next(iter(value.values()))
        tensors = load_file(path)
        os.remove(path)
        return tensors["array"] if "array" in value else tensors
    return value


def write(value, number):
    path = os.path.join(FOLDER, f"{number}.safetensors")
    if isinstance(value, np.ndarray):
        save_file({"array": np.ascontiguousarray(value)}, path)
        return {"array": path}
    if isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
        save_file({k: np.ascontiguousarray(v) for k, v in value.items()}, path)
        return {"tensors": path}
    return value


def main():
    model = Model()
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        try:
            operation = getattr(model, request["op"], None)
            if operation is None:
                raise Unsupported(request["op"])
            arguments = {k: read(v) for k, v in request.get("args", {}).items()}
            reply = {"ok": write(operation(**arguments), number)}
        except Unsupported as e:
            reply = {"unsupported": str(e)}
        except ValueError as e:
            reply = {"rejected": str(e)}
        except Exception as e:
            reply = {"error": repr(e)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
