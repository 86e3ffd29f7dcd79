"""The folder minipeft/ alone, copied to another place under another name, where no minipeft can be imported."""

import shutil

import pytest

from .processes import ROOT, run

NAME = "mypkg.deep.peft_copy"
NONE_BUT_THE_COPY = """
import sys

class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("minipeft", "conformance", "tests"):
            raise ModuleNotFoundError(f"{name} is not here", name=name)

sys.meta_path.insert(0, Blocker)
"""
EVERYTHING = """
import importlib, pickle, pkgutil, tempfile, warnings
import torch
from torch import nn
import mypkg.deep.peft_copy as P

for module in pkgutil.walk_packages(P.__path__, P.__name__ + "."):
    importlib.import_module(module.name)
for name in P.__all__:
    found = getattr(P, name)
    assert getattr(found, "__module__", P.__name__).partition(".")[0] in (P.__name__.partition(".")[0], "typing"), name
assert len(P.PEFT_TYPE_TO_CONFIG_MAPPING) == len(P.PeftType)
net = lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
warnings.simplefilter("ignore")
torch.manual_seed(0)
used = 0
for kind, cls in P.PEFT_TYPE_TO_TUNER_MAPPING.items():
    Config = P.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    target = "1" if kind == "LN_TUNING" else "0"
    more = {"feedforward_modules": []} if kind == "IA3" else {}
    try:
        model = P.get_peft_model(net(), Config(target_modules=[target], **more)).eval()
    except (P.PeftError, TypeError):
        continue  # needs more, or another model
    for parameter in model.parameters():
        parameter.data.add_(0.01 * parameter.requires_grad)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = P.PeftModel.from_pretrained(model.unload(), folder).eval()
    assert type(pickle.loads(pickle.dumps(again)).base_model) is cls
    used += 1
assert used > 20, used
print(used)
"""
AS_PEFT = """
import sys
import peft
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.utils.hotswap import hotswap_adapter
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

assert "mypkg.deep.peft_copy" in sys.modules and LoraConfig.__module__.startswith("mypkg.deep.peft_copy.methods")
model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
assert isinstance(model.base_model.model[0], LoraLayer) and isinstance(model.base_model, BaseTuner)
assert hotswap_adapter.__module__ == "mypkg.deep.peft_copy.compat.hotswap"
print(sys.argv[1])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vendored")
    shutil.copytree(ROOT / "minipeft", folder / NAME.replace(".", "/"), ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "sitecustomize.py").write_text(NONE_BUT_THE_COPY)
    (folder / "everything.py").write_text(EVERYTHING)
    (folder / "as_peft.py").write_text(AS_PEFT)
    return folder


def test_everything_imports_and_works(place):
    assert int(run(place / "everything.py", PYTHONPATH=str(place)).stdout) > 20


def test_in_the_place_of_peft(place):
    done = run("-m", f"{NAME}.compat", place / "as_peft.py", "an argument", PYTHONPATH=str(place))
    assert done.stdout.split("\n")[-2] == "an argument"
    usage = run("-m", f"{NAME}.compat", PYTHONPATH=str(place), check=False)
    assert usage.returncode != 0 and f"python -m {NAME}.compat" in usage.stderr
