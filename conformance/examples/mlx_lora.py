"""LoRA and DoRA in MLX, of linear layers and embeddings, as a program that the suite can check:

    python -m conformance --impl "cmd:python conformance/examples/mlx_lora.py" --methods lora,dora

The layers are modules, as in mlx-lm: an adapter stands around a frozen layer, whose weight it changes when merged.
It imports nothing of the suite and no torch.
"""

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

mx.set_default_device(mx.cpu)
PREFIX = "base_model.model."
FIELDS = {"peft_type", "task_type", "inference_mode", "target_modules", "r", "lora_alpha", "use_rslora", "use_dora"}
DTYPES = {"float32": mx.float32}
LAYERS = ("Linear", "Embedding", "Tanh")


class Unsupported(Exception):
    """The port does not claim it."""


class Rejected(Exception):
    """Refused on purpose: the input is wrong."""


class LoRA(nn.Module):
    """Around a frozen linear layer or embedding."""

    def __init__(self, layer, config):
        super().__init__()
        self.layer, self.words = layer, isinstance(layer, nn.Embedding)
        r = config.get("r", 8)
        self.scale = config.get("lora_alpha", 8) / (math.sqrt(r) if config.get("use_rslora") else r)
        self.factor, self.on, self.plain = 1.0, True, None
        outputs, inputs = self.matrix().shape
        bound = 1 / math.sqrt(inputs)
        if self.words:
            self.A, self.B = mx.zeros((r, inputs)), mx.random.normal((outputs, r))
        else:
            self.A, self.B = mx.random.uniform(-bound, bound, (r, inputs)), mx.zeros((outputs, r))
        self.m = mx.linalg.norm(self.matrix(), axis=1) if config.get("use_dora") else None

    def matrix(self):
        """The frozen weight, (outputs, inputs)."""
        return self.layer.weight.T if self.words else self.layer.weight

    def names(self):
        """PEFT's name -> this module's."""
        own = {"lora_embedding_A": "A", "lora_embedding_B": "B"} if self.words else {
            "lora_A.weight": "A", "lora_B.weight": "B"}
        return own if self.m is None else {**own, "lora_magnitude_vector": "m"}

    def adapted(self):
        W = self.matrix() + self.factor * self.scale * self.B @ self.A
        if self.m is None:
            return W
        # DoRA; its paper holds the norm constant in gradients, section 4.3
        return (self.m / mx.stop_gradient(mx.linalg.norm(W, axis=1)))[:, None] * W

    def merge(self):
        if self.plain is None:
            merged = self.adapted()
            self.plain, self.layer.weight = self.layer.weight, merged.T if self.words else merged

    def unmerge(self):
        if self.plain is not None:
            self.layer.weight, self.plain = self.plain, None

    def __call__(self, x):
        if not self.on or self.plain is not None:
            return self.layer(x)
        W = self.adapted()
        if self.words:
            return W.T[x]
        y = x @ W.T
        return y + self.layer.bias if "bias" in self.layer else y


def check(config):
    extra = sorted(k for k, v in config.items() if k not in FIELDS and v not in (None, False, [], {}, "none")
                   and (k, v) != ("init_lora_weights", True))
    if config["peft_type"] != "LORA" or extra or config.get("init_lora_weights", True) is not True \
            or not isinstance(config.get("target_modules"), list):
        raise Unsupported(f"LoRA and DoRA only, targets by list, no {', '.join(extra) or config['peft_type']}")
    if not isinstance(config.get("r", 8), int) or config.get("r", 8) < 1:
        raise Rejected(f"r must be a positive integer, not {config['r']!r}")


def make(kind, args):
    if kind == "Linear":
        return nn.Linear(args["in_features"], args["out_features"], bias=args.get("bias", True))
    if set(args) - {"num_embeddings", "embedding_dim"}:  # `padding_idx`: words that have no gradient
        raise Unsupported(f"no embedding with {sorted(args)}")
    return nn.Embedding(args["num_embeddings"], args["embedding_dim"])


class Model:
    """Its methods are the operations of the protocol; those that begin with an underscore are its own."""

    def info(self):
        return {"name": "mlx-lora", "version": mx.__version__, "dtypes": list(DTYPES)}

    def build(self, base, weights, config, dtype, case="", seed=0):
        if "layers" not in base or dtype not in DTYPES or {kind for _, kind, _ in base["layers"]} - {*LAYERS}:
            raise Unsupported(f"layers of {', '.join(LAYERS)} in {', '.join(DTYPES)} only")
        if config is not None:
            check(config)
        mx.random.seed(seed)
        layers = {name: mx.tanh if kind == "Tanh" else make(kind, args) for name, kind, args in base["layers"]}
        for key, value in weights.items():
            name, _, last = key.rpartition(".")
            setattr(layers[name], last, mx.array(value.astype(np.float32)))
        self.base_names = list(weights)
        self.layers, self.config, self.off = layers, config, 0
        if config is None:
            return
        for name, layer in layers.items():
            if layer is not mx.tanh and any(f".{name}".endswith(f".{target}") for target in config["target_modules"]):
                layers[name] = LoRA(layer, config)
        if not self._adapters():
            raise Rejected(f"target_modules {config['target_modules']} match none of {list(layers)}")

    def _adapters(self):
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, LoRA)}

    def _places(self):
        """Saved key -> (the layer's adapter, its name for the tensor)."""
        return {f"{PREFIX}{name}.{slot}": (lora, own) for name, lora in self._adapters().items()
                for slot, own in lora.names().items()}

    def _run(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x

    def load(self, tensors, name="default"):
        if name != "default":
            raise Unsupported("more than one adapter")
        places = self._places()
        if wrong := sorted(set(tensors) ^ set(places)):
            raise Rejected(f"missing or unexpected tensors: {wrong}")
        for key, value in tensors.items():
            lora, own = places[key]
            if value.shape != lora[own].shape:
                raise Rejected(f"{key}: shape {value.shape}, not {lora[own].shape}")
            if not np.isfinite(value).all():
                raise Rejected(f"{key} holds numbers that are not finite")
        self._set({key: mx.array(value.astype(np.float32)) for key, value in tensors.items()})

    def _set(self, tensors):
        for key, (lora, own) in self._places().items():
            lora[own] = tensors[key]

    def state_dict(self, name="default"):
        return {key: lora[own] for key, (lora, own) in self._places().items()}

    def forward(self, inputs, adapter_names=None):
        if adapter_names is not None:
            raise Unsupported("mixed batches")
        return self._run(mx.array(inputs["x"] if inputs["x"].dtype.kind == "i" else inputs["x"].astype(np.float32)))

    def gradients(self, inputs, cotangent):
        held, cotangent = self.state_dict(), mx.array(cotangent.astype(np.float32))
        words = inputs["x"].dtype.kind == "i"
        x = mx.array(inputs["x"] if words else inputs["x"].astype(np.float32))

        def loss(tensors, x):
            self._set(tensors)
            return (self._run(x) * cotangent).sum()

        try:
            if words:
                return mx.grad(loss)(held, x)
            found, outside = mx.grad(loss, argnums=(0, 1))(held, x)
            return {**found, "input": outside}
        finally:
            self._set(held)

    def train(self, on):
        """There is no dropout."""

    def step(self, inputs, cotangent, rate):
        found = self.gradients(inputs, cotangent)
        self._set({key: value - rate * found[key] for key, value in self.state_dict().items()})

    def weights(self):
        found = {}
        for key in self.base_names:
            name, _, last = key.rpartition(".")
            layer = self.layers[name]
            found[key] = (layer.layer if isinstance(layer, LoRA) else layer)[last]
        return found

    def names(self):
        if self.config is None:
            return dict.fromkeys(self.base_names, False)
        adapters, found = self._adapters(), {}
        for key in self.base_names:
            name, _, last = key.rpartition(".")
            found[f"{PREFIX}{name}{'.base_layer' if name in adapters else ''}.{last}"] = False
        for name, lora in adapters.items():
            for slot in lora.names():
                path, _, last = slot.partition(".")
                live = f"{path}.default" + (".weight" if last or path == "lora_magnitude_vector" else "")
                found[f"{PREFIX}{name}.{live}"] = not self.config.get("inference_mode")
        return found

    def count(self):
        own, others = (sum(v.size for v in tensors.values()) for tensors in (self.state_dict(), self.weights()))
        return [0 if self.config and self.config.get("inference_mode") else own, own + others]

    def active(self):
        return ["default"] if self.config else []

    def merge(self, names=None):
        for lora in self._adapters().values():
            lora.merge()

    def unmerge(self):
        for lora in self._adapters().values():
            lora.unmerge()

    def unload(self, merge):
        (self.merge if merge else self.unmerge)()
        self.layers = {name: layer.layer if isinstance(layer, LoRA) else layer for name, layer in self.layers.items()}
        self.config = None

    def disable(self, off):
        self.off = max(self.off + (1 if off else -1), 0)
        for lora in self._adapters().values():
            if lora.plain is not None:
                raise Unsupported("disabling what is merged")
            lora.on = not self.off

    def scale(self, factor):
        for lora in self._adapters().values():
            lora.factor *= factor

    def save(self, path):
        """Who loads the file does not train it, unless asked to."""
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "adapter_config.json").write_text(json.dumps({**self.config, "inference_mode": True}, indent=2))
        save_file({k: to_numpy(v) for k, v in self.state_dict().items()}, Path(path, "adapter_model.safetensors"))

    def restore(self, path, base, weights, dtype):
        try:
            config = json.loads(Path(path, "adapter_config.json").read_text())
            tensors = load_file(Path(path, "adapter_model.safetensors"))
        except (OSError, ValueError, SafetensorError) as error:
            raise Rejected(f"a file of the adapter cannot be read: {error}") from error
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise Rejected("adapter_config.json is no object with the peft_type LORA")
        self.build(base, weights, config, dtype)
        self.load(tensors)


def read(value):
    if isinstance(value, dict) and set(value) in ({"tensors"}, {"array"}):
        (path,) = value.values()
        tensors = load_file(path)
        os.remove(path)
        return tensors["array"] if "array" in value else tensors
    return value


def to_numpy(value):
    return np.ascontiguousarray(np.array(value))


def write(value, path):
    if isinstance(value, mx.array):
        save_file({"array": to_numpy(value)}, path)
        return {"array": path}
    if isinstance(value, dict) and value and all(isinstance(v, mx.array) for v in value.values()):
        save_file({k: to_numpy(v) for k, v in value.items()}, path)
        return {"tensors": path}
    return value


OPERATIONS = {name for name in vars(Model) if not name.startswith("_")}


def main():
    model, folder = Model(), tempfile.mkdtemp()  # in TMPDIR, the folder that the suite reads
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        try:
            if request["op"] not in OPERATIONS:
                raise Unsupported(request["op"])
            arguments = {k: read(v) for k, v in request.get("args", {}).items()}
            result = getattr(model, request["op"])(**arguments)
            reply = {"ok": write(result, os.path.join(folder, f"{number}.safetensors"))}
        except Unsupported as e:
            reply = {"unsupported": str(e)}
        except Rejected as e:
            reply = {"rejected": str(e)}
        except Exception as e:
            reply = {"error": repr(e)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
