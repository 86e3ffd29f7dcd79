"""What fixtures/README.md says of the data is true, and the loop that it shows does what it claims."""

import json
import subprocess
import sys
from functools import cache

import pytest

from conformance.drivers.oracle import Oracle
from conformance.reference import store
from conformance.reference.methods import methods

README = (store.folder() / "README.md").read_text()
LOOP = README.split("```python\n")[1].split("```")[0]
WITHOUT = ["torch", "safetensors", "conformance", "minipeft", "peft", "hypothesis", "rich", "tqdm"]
PORT = """
import importlib.util, pathlib, sys, types
sys.modules.update(dict.fromkeys({without}))
stub = types.ModuleType("safetensors.numpy"); stub.load_file = stub.save_file = None
sys.modules.update({{"safetensors": types.ModuleType("safetensors"), "safetensors.numpy": stub}})
spec = importlib.util.spec_from_file_location("numpy_lora", {example!r})
numpy_lora = importlib.util.module_from_spec(spec); spec.loader.exec_module(numpy_lora)

class Port(numpy_lora.Model):
    def build(self, *given):
        try:
            super().build(*given)
        except numpy_lora.Unsupported:
            return False
        return True

    def scaled_pair(self, layer):
        A, B, s = super().scaled_pair(layer)
        return A, B, s * {factor}

folder = pathlib.Path({folder!r})
exec({loop!r})
for case, what, good in check(Port(), folder, "lora"):
    print("right" if good else "wrong", case, what)
"""


@cache
def loop():
    names: dict = {}
    exec(LOOP, names)
    return names["check"]


def numpy_alone(factor):
    example = str(store.folder().parent / "conformance/examples/numpy_lora.py")
    text = PORT.format(without=WITHOUT, example=example, folder=str(store.folder()), loop=LOOP, factor=factor)
    seen = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert seen.returncode == 0, seen.stderr
    return seen.stdout


def test_the_loop_passes_with_numpy_alone():
    said = numpy_alone(1)
    assert "wrong" not in said and said.count("right lora/linear/plain") == 5 and said.count("\n") >= 10


def test_the_loop_sees_a_wrong_scale():
    said = numpy_alone(1.01)
    assert {line.split(maxsplit=2)[2] for line in said.splitlines() if line.startswith("wrong")} == {
        "forward",
        "merge",
        "merged output",
        "unmerge",
    }


class Port:
    """The formulas, which are told the case as they need it for what is convention."""

    def __init__(self, method):
        self.oracle, self.cases = Oracle(), iter(store.packs()[method].cases)

    def build(self, base, weights, config, dtype):
        self.case = next(self.cases)
        self.oracle.build(base, weights, store.resolved(config), dtype, self.case.id)
        return True

    def load(self, tensors):
        if self.case.data.get("live"):
            self.oracle.assign(self.case.tensors("adapter"))
        else:
            self.oracle.load(tensors)

    def __getattr__(self, name):
        if name == "gradients" and not self.case.id.startswith("ia3/"):
            raise AttributeError("finite differences of every case take too long here")
        return getattr(self.oracle, name)


@pytest.mark.parametrize("method", methods())
def test_the_loop_on_every_case(method):
    found = list(loop()(Port(method), store.folder(), method))
    assert found and not [(case, what) for case, what, good in found if not good]
    assert {case for case, _, _ in found} == {c.id for c in store.packs()[method].cases}
    assert ("gradients" in {what for _, what, _ in found}) is (method == "ia3")


def test_every_file_and_part_and_field_is_described():
    held = {p.relative_to(store.folder()).parts[0] for p in store.folder().rglob("*") if p.name != "README.md"}
    assert all(f"`{name}" in README for name in held)
    parts = {key.split("|")[1] for pack in store.packs().values() for key in pack.tensors}
    fields = json.loads((store.folder() / "schema.json").read_text())["properties"]["cases"]["items"]["properties"]
    told = {"id", "profile", "note", "base_name", "agreement"}  # that one needs no more than the schema's words
    assert not [word for word in parts | fields.keys() - told if f"`{word}`" not in README]


def test_the_loop_is_short():
    assert len([line for line in LOOP.splitlines() if line.strip()]) <= 40
