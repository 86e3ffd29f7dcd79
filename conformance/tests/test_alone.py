"""The suite without torch: what it knows of models it knows as data, so that a port in any language can be checked."""

import subprocess
import sys

import pytest

from conformance import models
from conformance.reference import bases, store

EXAMPLE = f"cmd:{sys.executable} conformance/examples/numpy_lora.py"
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['torch', 'minipeft', 'peft', 'pytest', 'jsonschema']));"
RUN = "from conformance.commands import main; sys.exit(main(sys.argv[1:]))"


def test_the_example_passes_where_there_is_no_torch():
    command = [sys.executable, "-c", WITHOUT + RUN, "--impl", EXAMPLE, "--methods", "lora"]
    seen = subprocess.run(command, capture_output=True, text=True, cwd=store.folder().parent, timeout=120)
    assert seen.returncode == 0, seen.stdout[-2000:] + seen.stderr[-2000:]
    assert "70 pass" in seen.stdout and "PASSED" in seen.stdout


def test_shapes_of_base_models_are_those_of_the_models():
    for name, base in bases.BASES.items():
        made = {key: tuple(p.shape) for key, p in models.make(base).named_parameters()}
        assert list(made.items()) == list(store.base_shapes(base).items()), name
    assert len(store.bases()) == len(bases.BASES)


@pytest.mark.parametrize("lacking", [["rich"], ["numpy"], ["hypothesis", "rich", "tqdm"]], ids=str)
def test_what_to_install_is_said(lacking):
    without = f"import sys, runpy; sys.modules.update(dict.fromkeys({lacking}));"
    command = [sys.executable, "-c", without + "runpy.run_module('conformance', run_name='__main__', alter_sys=True)"]
    seen = subprocess.run(command, capture_output=True, text=True, cwd=store.folder().parent, timeout=120)
    assert seen.returncode == 1 and "Traceback" not in seen.stderr
    assert f"needs {', '.join(lacking)}: pip install 'minipeft[conformance]'" in seen.stderr
