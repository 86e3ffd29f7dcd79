"""The suite without torch: what it knows of models it knows as data, so that a port in any language can be checked."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

from conformance import models
from conformance.reference import bases, store

EXAMPLES = {  # what has to be there, the command, what to run, and how many results pass at least
    "numpy": (True, f"{sys.executable} conformance/examples/numpy_lora.py", ["--methods", "lora"], 70),
    "node": (shutil.which("node"), "node conformance/examples/node_adapters.mjs",
             ["--methods", "lora,ia3", "--profile", "core"], 80),
    "jax": (importlib.util.find_spec("jax"), f"{sys.executable} conformance/examples/jax_lora.py",
            ["--methods", "lora,dora", "--profile", "core", "--cases", "linear/plain"], 18),
    "mlx": (importlib.util.find_spec("mlx"), f"{sys.executable} conformance/examples/mlx_lora.py",
            ["--methods", "lora,dora", "--profile", "core", "--cases", "linear/plain"], 18),
}
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['torch', 'minipeft', 'peft', 'pytest', 'jsonschema']));"
RUN = "from conformance.commands import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_passes_where_there_is_no_torch(name):
    there, program, chosen, passing = EXAMPLES[name]
    if not there:
        pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-c", WITHOUT + RUN, "--impl", f"cmd:{program}", *chosen]
    seen = subprocess.run(command, capture_output=True, text=True, cwd=store.folder().parent, timeout=120)
    assert seen.returncode == 0, seen.stdout[-2000:] + seen.stderr[-2000:]
    assert "PASSED" in seen.stdout and int(re.findall(r"(\d+) pass\b", seen.stdout)[0]) >= passing


def test_shapes_of_base_models_are_those_of_the_models():
    for name, base in bases.BASES.items():
        net = models.make(base)
        held = (*net.named_parameters(remove_duplicate=False), *net.named_buffers())
        made = {key: tuple(p.shape) for key, p in held}
        assert list(made.items()) == list(store.base_shapes(base).items()), name
    assert len(store.bases()) == len(bases.BASES)


@pytest.mark.parametrize("lacking", [["rich"], ["numpy"], ["hypothesis", "rich", "tqdm"]], ids=str)
def test_what_to_install_is_said(lacking):
    without = f"import sys, runpy; sys.modules.update(dict.fromkeys({lacking}));"
    command = [sys.executable, "-c", without + "runpy.run_module('conformance', run_name='__main__', alter_sys=True)"]
    seen = subprocess.run(command, capture_output=True, text=True, cwd=store.folder().parent, timeout=120)
    assert seen.returncode == 1 and "Traceback" not in seen.stderr
    assert f"needs {', '.join(lacking)}: pip install 'minipeft[conformance]'" in seen.stderr
