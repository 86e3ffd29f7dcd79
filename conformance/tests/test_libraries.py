"""The drivers of other libraries, where these are installed: right, but for their known issues."""

import importlib.util
import re
import subprocess
import sys

import pytest

from conformance.reference import store

LIBRARIES = {"loralib": "lora", "lycoris": "lora,dora,ia3", "torchtune": "lora,dora", "adapters": "lora,dora,ia3"}


@pytest.mark.parametrize(("least", "chosen"), [
    (20, ("--methods", "lora,vblora", "--cases", "linear/plain")),
    (12, ("--methods", "lora", "--checks", "usage", "--in-process"))], ids=("cases", "usage"))
def test_the_core_of_minipeft_passes(least, chosen):
    command = [sys.executable, "-m", "conformance", "--impl", "minipeft-core", "--profile", "core", *chosen]
    seen = subprocess.run(command, capture_output=True, text=True, cwd=store.folder().parent, timeout=120)
    assert seen.returncode == 0, seen.stdout[-2000:] + seen.stderr[-2000:]
    assert int(re.findall(r"(\d+) pass\b", seen.stdout)[0]) >= least


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_it_gets_wrong_is_known(library):
    if not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed")
    command = [sys.executable, "-m", "conformance", "--impl", library, "--methods", LIBRARIES[library],
               "--profile", "core", "--cases", "linear/"]
    seen = subprocess.run(command, capture_output=True, text=True, cwd=store.folder().parent, timeout=120)
    assert seen.returncode == 0, seen.stdout[-2000:] + seen.stderr[-2000:]
    assert int(re.findall(r"(\d+) pass\b", seen.stdout)[0]) >= 5
