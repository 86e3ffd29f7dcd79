"""LoRA and DoRA in JAX, of linear layers, convolutions and embeddings, as a program that the suite can check:

    python -m conformance --impl "cmd:python conformance/examples/jax_lora.py" --methods lora,dora

A model is a function of its trained tensors, and an adapter changes the weights that the function uses: so there is
one formula, `adapted`, for running, merging and gradients. It imports nothing of the suite and no torch.
"""

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

jax.config.update("jax_enable_x64", True)
PREFIX = "base_model.model."
FIELDS = {"peft_type", "task_type", "inference_mode", "target_modules", "r", "lora_alpha", "use_rslora", "use_dora"}
ON = {"init_lora_weights"}  # by default
DTYPES = {"float64": jnp.float64, "float32": jnp.float32}  # bfloat16 would round the adapted weight too far
KINDS = {"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"}


class Unsupported(Exception):
    """The port does not claim it."""


class Rejected(Exception):
    """Refused on purpose: the input is wrong."""


def rank(config):
    r = config.get("r", 8)
    if not isinstance(r, int) or r < 1:
        raise Rejected(f"r must be a positive integer, not {r!r}")
    return r


def scaling(config):
    return config.get("lora_alpha", 8) / (math.sqrt(rank(config)) if config.get("use_rslora") else rank(config))


def pair(kind):
    return ("lora_embedding_A", "lora_embedding_B") if kind == "Embedding" else ("lora_A.weight", "lora_B.weight")


def norm(V):
    """One for each output, in the shape of V but for ones."""
    return jnp.sqrt(jnp.sum(V * V, axis=tuple(range(1, V.ndim)), keepdims=True))


def adapted(kind, W, t, s):
    """The layer's weight with the adapter's tensors `t` at strength `s`."""
    V = W.T if kind == "Embedding" else W  # outputs first
    A, B = (t[name] for name in pair(kind))
    V = V + s * (B.reshape(B.shape[0], -1) @ A.reshape(A.shape[0], -1)).reshape(V.shape)
    if "lora_magnitude_vector" in t:  # DoRA; its paper holds the norm constant in gradients, section 4.3
        length = jax.lax.stop_gradient(norm(V))
        V = t["lora_magnitude_vector"].reshape(length.shape) * V / length
    return V.T if kind == "Embedding" else V


def apply(kind, args, W, b, x):
    if kind == "Embedding":
        return W[x] * args.get("embed_scale", 1)
    if kind == "Linear":
        y = x @ W.T
        return y if b is None else y + b
    axes = int(kind[4])

    def each(value):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * axes

    y = jax.lax.conv_general_dilated(
        x, W, each(args.get("stride", 1)), [(p, p) for p in each(args.get("padding", 0))],
        rhs_dilation=each(args.get("dilation", 1)), feature_group_count=args.get("groups", 1))
    return y if b is None else y + b.reshape(-1, *[1] * axes)


class Model:
    """Its public methods are the operations of the protocol."""

    def info(self):
        return {"name": "jax-lora", "version": jax.__version__, "dtypes": list(DTYPES)}

    def build(self, base, weights, config, dtype, case="", seed=0):
        if "layers" not in base or dtype not in DTYPES:
            raise Unsupported(f"layers in {', '.join(DTYPES)} only")
        if strange := {kind for _, kind, _ in base["layers"]} - KINDS - {"Tanh"}:
            raise Unsupported(f"no {', '.join(sorted(strange))}")
        if any("padding_idx" in args for *_, args in base["layers"]):
            raise Unsupported("words that pad, which have no gradient")
        if config is not None:
            extra = sorted(k for k, v in config.items() if k not in FIELDS and (v is not True if k in ON else v)
                           and v != "none")
            if config["peft_type"] != "LORA" or extra or not isinstance(config.get("target_modules"), list):
                raise Unsupported(f"LoRA and DoRA only, targets by list, no {', '.join(extra) or config['peft_type']}")
        dtype_, draw = DTYPES[dtype], np.random.default_rng(seed)
        W = {k: jnp.asarray(v, dtype_) for k, v in weights.items()}
        adapter = {}
        for name, kind, args in base["layers"] if config is not None else ():
            if not any(name == t or name.endswith(f".{t}") for t in config["target_modules"]):
                continue
            if args.get("groups", 1) > 1:
                raise Unsupported("no grouped convolutions")
            adapter[name] = self.fresh(kind, W[f"{name}.weight"], config, draw)
        if config is not None and not adapter:
            layers = [name for name, _, _ in base["layers"]]
            raise Rejected(f"target_modules {config['target_modules']} match none of {layers}")
        self.base, self.W, self.config, self.adapter, self.dtype = base, W, config, adapter, dtype_
        self.factor, self.off, self.before = 1.0, 0, None

    def fresh(self, kind, W, config, draw):
        """One tensor of the pair is zero, so that a new adapter changes nothing."""
        r, V = rank(config), W.T if kind == "Embedding" else W
        A, B = (r, *V.shape[1:]), (V.shape[0], r, *[1] * (V.ndim - 2))
        if kind == "Embedding":
            drawn = np.zeros(A), draw.normal(size=B)
        else:
            drawn = draw.uniform(-1, 1, A) / math.sqrt(math.prod(A[1:])), np.zeros(B)
        found = {name: jnp.asarray(v, W.dtype) for name, v in zip(pair(kind), drawn)}
        if config.get("use_dora"):
            found["lora_magnitude_vector"] = norm(V).reshape(-1) if V.ndim == 2 else jnp.swapaxes(norm(V), 0, 1)
        return found

    def output(self, adapter, x):
        """The model as a function of what is trained and of the input."""
        for name, kind, args in self.base["layers"]:
            if kind == "Tanh":
                x = jnp.tanh(x)
                continue
            W = self.W[f"{name}.weight"]
            if name in adapter and not self.off and self.before is None:
                W = adapted(kind, W, adapter[name], self.strength())
            x = apply(kind, args, W, self.W.get(f"{name}.bias"), x)
        return x

    def strength(self):
        return self.factor * scaling(self.config)

    def given(self, x):
        return jnp.asarray(x) if np.issubdtype(x.dtype, np.integer) else jnp.asarray(x, self.dtype)

    def load(self, tensors, name="default"):
        if name != "default":
            raise Unsupported("more than one adapter")
        own = self.state_dict()
        if wrong := sorted(set(tensors) ^ set(own)):
            raise Rejected(f"missing or unexpected tensors: {wrong}")
        for key, value in tensors.items():
            if value.shape != own[key].shape:
                raise Rejected(f"{key}: shape {value.shape}, not {own[key].shape}")
            if not np.isfinite(value).all():
                raise Rejected(f"{key} holds numbers that are not finite")
        self.adapter = {layer: {slot: jnp.asarray(tensors[f"{PREFIX}{layer}.{slot}"], self.dtype) for slot in t}
                        for layer, t in self.adapter.items()}

    def keyed(self, adapter):
        return {f"{PREFIX}{layer}.{slot}": v for layer, t in adapter.items() for slot, v in t.items()}

    def state_dict(self, name="default"):
        return self.keyed(self.adapter)

    def forward(self, inputs, adapter_names=None):
        if adapter_names is not None:
            raise Unsupported("mixed batches")
        return self.output(self.adapter, self.given(inputs["x"]))

    def gradients(self, inputs, cotangent):
        x = self.given(inputs["x"])
        if jnp.issubdtype(x.dtype, jnp.integer):
            _, back = jax.vjp(lambda adapter: self.output(adapter, x), self.adapter)
            return self.keyed(*back(self.given(cotangent)))
        _, back = jax.vjp(self.output, self.adapter, x)
        adapter, outside = back(self.given(cotangent))
        return {**self.keyed(adapter), "input": outside}

    def train(self, on):
        """There is no dropout."""

    def step(self, inputs, cotangent, rate):
        found = self.gradients(inputs, cotangent)
        self.adapter = {layer: {slot: v - jnp.asarray(rate * found[f"{PREFIX}{layer}.{slot}"], self.dtype)
                                for slot, v in t.items()} for layer, t in self.adapter.items()}

    def names(self):
        if self.config is None:
            return dict.fromkeys(self.W, False)
        found = {}
        for key in self.W:
            layer, _, last = key.rpartition(".")
            found[f"{PREFIX}{layer}{'.base_layer' if layer in self.adapter else ''}.{last}"] = False
        live = {"lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight",
                "lora_magnitude_vector": "lora_magnitude_vector.default.weight"}
        return found | {f"{PREFIX}{layer}.{live.get(slot, f'{slot}.default')}": not self.config.get("inference_mode")
                        for layer, t in self.adapter.items() for slot in t}

    def count(self):
        own, all_others = (sum(v.size for v in tensors.values()) for tensors in (self.state_dict(), self.W))
        return 0 if self.config and self.config.get("inference_mode") else own, own + all_others

    def active(self):
        return ["default"] if self.config else []

    def weights(self):
        return self.W

    def merge(self, names=None):
        if self.before is None:
            kinds = {name: kind for name, kind, _ in self.base["layers"]}
            self.before = self.W
            self.W = {**self.W, **{f"{name}.weight": adapted(kinds[name], self.W[f"{name}.weight"], t, self.strength())
                                   for name, t in self.adapter.items()}}

    def unmerge(self):
        if self.before is not None:
            self.W, self.before = self.before, None

    def unload(self, merge):
        (self.merge if merge else self.unmerge)()
        self.adapter, self.config, self.before, self.off = {}, None, None, 0

    def disable(self, off):
        if self.before is not None:
            raise Unsupported("disabling what is merged")
        self.off = max(self.off + (1 if off else -1), 0)

    def scale(self, factor):
        self.factor *= factor

    def copy(self):
        """Arrays of JAX never change, so a copy may share them."""

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


def to_numpy(value):
    return np.ascontiguousarray(value)


def read(value):
    if isinstance(value, dict) and set(value) in ({"tensors"}, {"array"}):
        (path,) = value.values()
        tensors = load_file(path)
        os.remove(path)
        return tensors["array"] if "array" in value else tensors
    return value


def write(value, path):
    if isinstance(value, jax.Array):
        save_file({"array": to_numpy(value)}, path)
        return {"array": path}
    if isinstance(value, dict) and value and all(isinstance(v, jax.Array) for v in value.values()):
        save_file({k: to_numpy(v) for k, v in value.items()}, path)
        return {"tensors": path}
    return value


HELPERS = {"adapted", "fresh", "given", "keyed", "output", "strength"}
OPERATIONS = {name for name in vars(Model) if not name.startswith("_")} - HELPERS


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
