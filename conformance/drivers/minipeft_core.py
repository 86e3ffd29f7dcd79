"""minipeft's core as a library: the functions of `core.api`, of minipeft or of a copy that `minipeft.vendor` wrote.

They work on a plain module; no PeftModel is made.

Live names and saved keys are those of the plain module; here they get PEFT's prefix. What the core does not offer
(prompts, `modules_to_save`, trained biases) it says itself.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

from .. import models
from ..driver import Driver, Unsupported
from ..reference.method import KEY
from .peft_api import PeftApi, rejecting

# what PeftApi does with a PeftModel, and the core has no function for
ABSENT = ("active", "adapted_like", "allocate", "auto", "base_state", "build_from_data", "build_quantised",
          "build_with", "combine", "config_of", "generate", "load_adapter_with", "read_config", "reduce_intruders",
          "rescale", "restore_routed", "save_converted", "save_given", "set_base_state")
PER_SAMPLE = ("adapter_names", "alora_offsets", "task_ids")
SHARED = "base_model."  # keys of tensors that belong to no single layer
WHOLE = ("SHADOW", "XLORA")  # methods of a model as a whole
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


class Core(PeftApi):
    def __init__(self, module: str = "minipeft"):
        super().__init__(module)
        self.core = importlib.import_module(f"{module}.core.api")

    def config(self, config):
        if config.get("peft_type") in WHOLE or config.get("task_type") in HEADS:
            raise Unsupported("more than layers: a method of the whole model, or a task's head")
        if not (config.get("target_modules") or config.get("target_parameters")):
            raise Unsupported("default targets of known models")
        return super().config(config)

    def info(self):
        return {**super().info(), "name": f"{self.peft.__name__}.core"}

    def begin(self):
        super().begin()
        self.chosen: list[str] = []

    def build(self, base, weights, config, dtype, case="", seed=0):
        self.begin()
        if config and config.get("alora_invocation_tokens") and "model" in base:
            raise Unsupported("look for invocations in texts")
        self.model = self.base(base, weights, dtype)
        models.seed(seed)
        if config is not None:
            with rejecting():
                self.core.inject_adapter_in_model(self.config(config), self.model)
            self.chosen = ["default"]
        self.model.to(self.dtype).eval()

    def add(self, name, config):
        trained = {k: p.requires_grad for k, p in self.model.named_parameters()}
        with rejecting():
            self.core.inject_adapter_in_model(self.config(config), self.model, name)
        self.switch(self.chosen)
        for k, p in self.model.named_parameters():
            p.requires_grad_(trained.get(k, p.requires_grad))
        self.model.to(self.dtype).train(self.training)

    def delete(self, name):
        with rejecting():
            self.core.delete_adapter(self.model, name)
        self.chosen = [a for a in self.chosen if a != name] or ["default"]

    def load(self, tensors, name="default"):
        with rejecting():
            self.core.set_peft_model_state_dict(self.model, self.tensors(tensors), name)

    def run(self, first, more):
        own = {k: more[k] for k in PER_SAMPLE if k in more}
        rest = {k: v for k, v in more.items() if k not in PER_SAMPLE}
        with self.core.mixed_batch(self.model, **own) if own and self.chosen else contextlib.nullcontext():
            return super().run(first, rest)

    def saved(self, name="default"):
        found = self.core.get_peft_model_state_dict(self.model, name)
        return {k if k.startswith(SHARED) else KEY + k: v for k, v in found.items()}

    def names(self):
        prefix = KEY if self.chosen else ""
        return {prefix + k: p.requires_grad for k, p in self.model.named_parameters()}

    def count(self):
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def dtypes(self):
        return {KEY + k: v for k, v in super().dtypes().items()}

    def merge(self, names=None):
        with rejecting():
            self.core.merge(self.model, names)

    def safe_merge(self, names=None):
        with rejecting():
            self.core.merge(self.model, names, safe_merge=True)

    def unmerge(self):
        with rejecting():
            self.core.unmerge(self.model)

    def unload(self, merge, names=None):
        named = {"adapter_names": names} if names else {}
        with rejecting():
            self.model = self.core.merge_and_unload(self.model, **named) if merge else self.core.unload(self.model)
        self.chosen = []

    def switch(self, names, for_use=False):
        with rejecting():
            self.core.set_adapter(self.model, list(names), for_use)
        self.chosen = list(names)

    def disable(self, off):
        if off:
            self.disabled.append(self.core.disable_adapter(self.model))
            self.disabled[-1].__enter__()
        elif self.disabled:
            self.disabled.pop().__exit__(None, None, None)

    def switch_off(self, off):
        raise Unsupported("switch adapters off but in a context")

    def penalty(self):
        raise Unsupported("further terms of the loss")

    def held(self):
        return [KEY + name for name in super().held()]

    def require_grad(self, names, on):
        self.core.set_requires_grad(self.model, names, on)

    def assign(self, tensors):
        super().assign({k.removeprefix(KEY): v for k, v in tensors.items()})

    def live_gradients(self, inputs, cotangent):
        return {k if k == "input" else KEY + k: v for k, v in super().live_gradients(inputs, cotangent).items()}

    def save(self, path):
        with rejecting():
            self.core.save_adapter(self.model, path)

    def save_adapters(self, path, names=None):
        if names is None or len(names) > 1:
            raise Unsupported("save several adapters at once")
        with rejecting():
            self.core.save_adapter(self.model, path if names == ["default"] else Path(path, *names), *names)

    def load_adapter(self, path, name):
        with rejecting():
            self.core.load_adapter(self.model, path, name)
        self.switch(self.chosen)
        self.model.to(self.dtype).train(self.training)

    def save_with(self, path, options):
        raise Unsupported("options of saving")

    def hotswap(self, path, name):
        raise Unsupported("put an adapter in the place of another")

    def restore(self, path, base, weights, dtype):
        self.restore_with(path, base, weights, dtype, {})
        self.model.to(self.dtype)

    def restore_with(self, path, base, weights, dtype, options):
        if options.keys() - {"is_trainable"}:
            raise Unsupported(f"options of loading: {', '.join(options)}")
        self.begin()
        self.model = self.base(base, weights, dtype)
        with rejecting():
            self.core.load_adapter(self.model, path, **options)
        self.chosen = ["default"]
        self.model.eval()


for _name in ABSENT:
    setattr(Core, _name, getattr(Driver, _name))
