"""Bad adapters: each has to be refused with a clear error, in the phase that is named, leaving the model as it was."""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path

import numpy as np

from ...driver import Rejected
from ...reference.compare import Failure
from ...reference.method import turned
from .goldens import start


def refuse(what, call):
    try:
        call()
    except Rejected:
        return
    raise Failure(f"{what} was accepted", expected="a clear error", got="no error")


def first(tensors):
    return min(tensors)


LOAD = {
    "missing tensor": lambda t: {k: v for k, v in t.items() if k != first(t)},
    "extra tensor": lambda t: {**t, "base_model.model.nowhere.lora_A.weight": np.ones((2, 2), np.float32)},
    "misshapen tensor": lambda t: {**t, first(t): np.ones((3, *t[first(t)].shape), np.float32)},
    "not a number": lambda t: {**t, first(t): np.full_like(t[first(t)], np.nan)},
    "infinite": lambda t: {**t, first(t): np.full_like(t[first(t)], np.inf)},
    "no tensors": lambda t: {},
}

CONFIG: dict[str, dict] = {
    "rank zero": {"r": 0}, "negative rank": {"r": -1}, "rank is text": {"r": "8"},
    "unknown method": {"peft_type": "NO_SUCH_METHOD"}, "targets match nothing": {"target_modules": ["nowhere"]},
}


def damage_truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def damage_empty(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"")


def damage_pickle(folder):
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"lora_A": [1.0]}))


def damage_directory(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()


def damage_missing(folder):
    (folder / "adapter_model.safetensors").unlink()


def damage_config_list(folder):
    (folder / "adapter_config.json").write_text(json.dumps(["LORA"]))


def damage_config_half(folder):
    file = folder / "adapter_config.json"
    file.write_text(file.read_text()[:-30])


def damage_config_type(folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "NO_SUCH_METHOD"}))


FILES = {
    "truncated safetensors": damage_truncate, "empty safetensors": damage_empty, "pickle renamed": damage_pickle,
    "a folder for a file": damage_directory, "no weights": damage_missing, "config is a list": damage_config_list,
    "half a config": damage_config_half, "config of an unknown method": damage_config_type,
}


def bad_load(driver, case, dtype, what):
    adapter = turned(case.tensors("adapter"), start(driver, case, dtype))
    inputs = case.tensors("input")
    before, state = driver.forward(inputs), driver.state_dict()
    refuse(f"an adapter with {what}", lambda: driver.load(LOAD[what](adapter)))
    if not np.array_equal(driver.forward(inputs), before):
        raise Failure(f"{what} was refused, but the model's output changed")
    changed = [k for k, v in driver.state_dict().items() if not np.array_equal(v, state[k])]
    if changed:
        raise Failure(f"{what} was refused, but {changed} changed")


def bad_config(driver, case, dtype, what):
    config = {**case.config, **CONFIG[what]}
    refuse(f"a config with {what}", lambda: driver.build(case.base, case.tensors("base"), config, dtype, case=case.id))


def bad_file(driver, case, dtype, what):
    start(driver, case, dtype)
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        FILES[what](Path(path))
        refuse(f"a checkpoint with {what}", lambda: driver.restore(path, case.base, case.tensors("base"), dtype))
