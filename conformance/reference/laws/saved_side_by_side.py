"""Several adapters of a model are saved into folders of their own, all or those asked for, and come back from them."""

import tempfile
from pathlib import Path

import numpy as np

from ..compare import Failure

TITLE = "several adapters saved"
MOST = 2
NAMES = ("lora", "lora_2")  # one within the other, and within many a parameter's name
FILES = ("adapter_config.json", "adapter_model.safetensors")


def applies(method):
    return not method.laws.single


def check(driver, sample):
    held, out = several(driver, sample, NAMES)
    with tempfile.TemporaryDirectory() as path:
        few, all_of_them = Path(path, "few"), Path(path, "all")
        driver.save_adapters(str(few), [NAMES[1]])
        written(few, [NAMES[1]])
        driver.save_adapters(str(all_of_them))
        written(all_of_them, ["default", *NAMES])
        sample.same("output after saving", driver.forward(sample.inputs), out[NAMES[-1]])
        driver.restore(str(few / NAMES[1]), sample.base, sample.weights, sample.dtype)
        sample.same(f"output of {NAMES[1]!r}, loaded alone", driver.forward(sample.inputs), out[NAMES[1]])
        load_and_compare(driver, sample, all_of_them, held, out)


def several(driver, sample, names):
    """Adapters of these names beside the first; for each name, what a checkpoint holds, and the output."""
    sample.start(driver)
    held, out = {"default": driver.state_dict()}, {"default": driver.forward(sample.inputs)}
    for i, name in enumerate(names):
        driver.add(name, {**sample.config, **sample.method.laws.second})
        driver.load(sample.tensors(driver, name, seed=i + 1), name)
        held[name] = driver.state_dict(name)
    for name in names:
        driver.switch([name])
        out[name] = driver.forward(sample.inputs)
    for name in ("default", *names):
        same_tensors(sample, f"what is saved of {name!r}", driver.state_dict(name), held[name])
    return held, out


def load_and_compare(driver, sample, path, held, out):
    """All adapters that `path` holds, on a new base model."""
    driver.restore(str(path), sample.base, sample.weights, sample.dtype)
    names = [name for name in held if name != "default"]
    for name in names:
        driver.load_adapter(str(Path(path, name)), name)
    sample.same("output after loading others beside the first", driver.forward(sample.inputs), out["default"])
    for name in (*reversed(names), "default"):
        driver.switch([name])
        sample.same(f"output of {name!r}, loaded beside others", driver.forward(sample.inputs), out[name])
        same_tensors(sample, f"{name!r}, saved and loaded", driver.state_dict(name), held[name])


def written(folder, names):
    want = {str(Path(file) if name == "default" else Path(name, file)) for name in names for file in FILES}
    got = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name in FILES}
    if got != want:
        raise Failure(f"files of the adapters {list(names)}", expected=str(sorted(want)), got=str(sorted(got)))


def same_tensors(sample, what, got, want):
    if got.keys() != want.keys():
        raise Failure(f"{what}: its keys, config {sample.config}", expected=str(sorted(want)), got=str(sorted(got)))
    for key, value in want.items():
        if not np.array_equal(got[key], value):
            raise Failure(f"{what}: {key} has other values, config {sample.config}")
