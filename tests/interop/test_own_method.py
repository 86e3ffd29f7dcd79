"""A method from outside: the example package, the suite on it, plug-ins, and what is refused."""

import os

import pytest

from .processes import ROOT, SCRIPTS, run

EXAMPLE = ROOT / "examples" / "own_method"
PATH = os.pathsep.join(map(str, (ROOT, EXAMPLE)))


def test_methods_variants_and_kinds_of_layers():
    assert run(SCRIPTS / "own.py").stdout.splitlines()[-1] == "fine"


def test_the_example(tmp_path):
    done = run("-m", "pytest", EXAMPLE, "-q", "-p", "no:cacheprovider", "-c", os.devnull, PYTHONPATH=PATH)
    assert "5 passed" in done.stdout


SUITE = """
import sys
import gated_lora
from conformance.commands import main

ARGUMENTS = ["laws", "--method", "gated_lora.reference:METHOD", "--profile", "core"]
assert main(ARGUMENTS) == 0
right = gated_lora.GatedLora.delta
gated_lora.GatedLora.delta = lambda self: 1.01 * right(self)  # what is folded is not what runs
print("from here on it is wrong")
assert main(ARGUMENTS) == 1
assert main(["record", "--formula", "gated_lora.reference:METHOD", sys.argv[1]]) == 0
"""


def test_the_suite_checks_it_and_catches_a_wrong_fold(tmp_path):
    right, wrong = run("-c", SUITE, tmp_path, PYTHONPATH=PATH).stdout.split("from here on it is wrong")
    assert "PASSED" in right and "FAILED" not in right and "run-is-merge" in wrong
    assert (tmp_path / "methods" / "gated_lora.safetensors").exists()


@pytest.mark.parametrize("words, said", [
    (["laws", "--method", "no.such:METHOD"], "is no method"),
    (["laws", "--method", "conformance.reference.methods.vera:shapes"], "is a function"),
    (["laws"], "--method"),
], ids=["no module", "no method", "nothing"])  # fmt: skip
def test_what_the_suite_refuses(words, said):
    done = run("-m", "conformance", *words, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


MAKE = """
import sys, torch, minipeft, gated_lora
net = torch.nn.Sequential(torch.nn.Linear(4, 6))
minipeft.get_peft_model(net, gated_lora.GatedLoraConfig(target_modules=["0"])).save_pretrained(sys.argv[1])
"""
LOAD = """
import sys, torch, minipeft
net = torch.nn.Sequential(torch.nn.Linear(4, 6))
try:
    print(type(minipeft.PeftModel.from_pretrained(net, sys.argv[1]).peft_config["default"]).__name__)
except minipeft.ConfigError as error:
    print(error)
"""


def test_another_process_finds_it_by_its_entry_point(tmp_path):
    run("-c", MAKE, tmp_path / "saved", PYTHONPATH=PATH)
    assert "import that first" in run("-c", LOAD, tmp_path / "saved", PYTHONPATH=PATH).stdout
    installed = tmp_path / "site" / "gated_lora-0.1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: gated-lora\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text("[minipeft.methods]\nGATED_LORA = gated_lora.method\n")
    path = os.pathsep.join([PATH, str(tmp_path / "site")])
    assert run("-c", LOAD, tmp_path / "saved", PYTHONPATH=path).stdout.split() == ["GatedLoraConfig"]
