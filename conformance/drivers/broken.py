"""Implementations broken as a whole, for the suite's tests of itself: `--impl conformance.drivers.broken:Hanging`."""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np

from ..driver import Driver, Rejected, Unsupported
from ..reference.methods import methods
from .oracle import Oracle


class AlwaysWrong(Oracle):
    """Answers everything, and every answer is wrong."""

    def forward(self, inputs, adapter_names=None):
        return super().forward(inputs) * 1.5 + np.arange(len(next(iter(inputs.values()))), dtype=float).reshape(
            -1, *[1] * (np.ndim(super().forward(inputs)) - 1)) + 1

    def gradients(self, inputs, cotangent):
        return {}

    def names(self):
        return {"nothing": True}

    def count(self):
        return 0, 0

    def dtypes(self):
        return dict.fromkeys(super().dtypes(), "float16")

    def status(self):
        return {"layers": {}, "model": {}}

    def held(self):
        return ["nothing"]

    def best_conditioned(self, base, weights, options):
        return {"target_modules": [], "target_parameters": []}

    def state_dict(self, name="default"):
        return {k + "_": v for k, v in super().state_dict(name).items()}

    def weights(self):
        draw = np.random.default_rng()
        return {k: draw.normal(size=v.shape) for k, v in super().weights().items()}

    def full_config(self, config):
        return {**super().full_config(config), "peft_type": "WRONG"}

    def load(self, tensors, name="default"):
        pass

    def save(self, path):
        pass

    def save_adapters(self, path, names=None):
        pass

    def read_config(self, path, given):
        return {"peft_type": "WRONG"}

    def restore(self, path, base, weights, dtype):
        pass

    def build(self, base, weights, config, dtype, case="", seed=0):
        if base.get("model") == "skeleton":
            raise ValueError("no skeletons")
        config = {**config, "peft_type": self.type_of(case), "r": 4} if config else None
        with contextlib.suppress(Rejected):  # what should be refused is taken
            super().build(base, weights, config, dtype, case, seed)

    @staticmethod
    def type_of(case):
        return methods()[case.split("/")[0]].peft_type


class Forking(Oracle):
    """Counts wrongly, and goes on twice after it has told its tensors."""

    def count(self):
        trained, whole = super().count()
        return trained + 1, whole

    def state_dict(self, name="default"):
        found = super().state_dict(name)
        os.fork()
        return found


class AlwaysUnsupported(Driver):
    """Claims nothing."""

    def info(self):
        return {"name": "always-unsupported", "version": "0", "dtypes": ["float32"]}

    def build(self, *args, **kwargs):
        raise Unsupported("nothing is supported")


class Raising(Driver):
    """Raises an error of a kind that no library means."""

    def info(self):
        return {"name": "raising", "version": "0", "dtypes": ["float32"]}

    def build(self, *args, **kwargs):
        raise IndexError("list index out of range")

    full_config = build_with = build_quantised = build_from_data = read_config = best_conditioned = build


class Dying(Raising):
    """Takes its process down: to be run out of process."""

    def build(self, *args, **kwargs):
        os._exit(139)


class Hanging(Raising):
    """Never answers."""

    def build(self, *args, **kwargs):
        time.sleep(3600)
