"""Packages of some methods, written by minipeft.vendor: they work alone, are checked, and are brought up to date."""

import hashlib
import os
import re
import shutil
import subprocess

import pytest

from minipeft import __version__, vendor
from minipeft.core import registry

from .processes import ROOT, SCRIPTS, last_line, run

WHOLE = {"ADAPTION_PROMPT", "SHADOW", "XLORA"}  # they adapt models as a whole
LAYERS = [kind.lower() for kind, file in registry.FILES.items() if kind not in WHOLE and ".prompts." not in file]


def test_every_layer_method_works_alone(tmp_path):
    for name in [*LAYERS, "dora"]:
        vendor.write([name], tmp_path / "copies" / f"only_{name}", [])
    (tmp_path / "copies" / "__init__.py").touch()
    assert len(last_line(run(SCRIPTS / "vendored.py", tmp_path, PYTHONPATH=""))) == len(LAYERS) + 1 > 35


TEN = ["lora", "dora", "ia3", "vera", "oft", "boft", "hra", "c3a", "loha", "poly"]


def test_the_suite_passes_on_a_copy(tmp_path):
    vendor.write(TEN, tmp_path / "some" / "lite", [])
    words = ["--methods", ",".join(TEN), "--profile", "core", "--cases", "linear/", "--checks", "forward,merge,save"]
    path = os.pathsep.join(map(str, (ROOT, tmp_path)))
    seen = run("-m", "conformance", "--impl", "some.lite", *words, PYTHONPATH=path)
    assert seen.stdout.startswith(f"some.lite.core {__version__}") and "PASSED" in seen.stdout
    assert all(re.search(rf"^ {name} ", seen.stdout, re.M) for name in TEN)


WITH_MODEL = """
import sys
sys.modules["minipeft"] = None
import torch, tempfile, warnings
import deep.er.whole as P

warnings.simplefilter("ignore")
net = lambda: (torch.manual_seed(0), torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)))[1]
for config in (P.LoraConfig(target_modules=["0"], modules_to_save=["1"], init_lora_weights=False),
               P.AdaLoraConfig(target_modules=["0"], total_step=10, bias="all")):
    model, x = P.get_peft_model(net(), config), torch.randn(2, 4)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * parameter.requires_grad)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(P.PeftModel.from_pretrained(net(), folder)(x), model(x))
    assert torch.allclose(model.merge_and_unload()(x), model(x), atol=1e-5)
assert {"PromptTuningConfig", "CPTConfig"} <= set(P.__all__)
print(type(model.base_model).__name__, len(P.__all__))
"""


def test_with_peft_model_and_prompts(tmp_path):
    vendor.write(["lora", "adalora"], tmp_path / "deep" / "er" / "whole", ["peft-model", "prompts"])
    assert run("-c", WITH_MODEL, PYTHONPATH=str(tmp_path)).stdout.startswith("AdaLoraModel")


def test_a_copy_is_what_is_here_and_names_nothing_outside_of_it(tmp_path):
    files = vendor.write(["lora", "dora", "vera"], tmp_path / "lite", [])
    there = {p.relative_to(tmp_path / "lite").as_posix() for p in (tmp_path / "lite").rglob("*") if p.is_file()}
    assert there == files.keys() | {vendor.RECORD}
    assert files["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    for path, data in files.items():
        if path.endswith(".py") and path not in ("__init__.py", "methods/__init__.py"):
            assert data == (ROOT / "minipeft" / path).read_bytes()
            assert b"import minipeft" not in data and b"from minipeft" not in data
    assert not [path for path in files if path.startswith(("model/", "compat/", "methods/ia3"))]


@pytest.mark.parametrize("words", [["lor", "x"], ["x"], ["lora", "not-a-name"]], ids=" ".join)
def test_what_cannot_be_written(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = vendor.main(words)
    except SystemExit as stopped:  # as argparse does
        status = stopped.code
    assert status == 2 and not any(tmp_path.iterdir())
    assert {"lor": "'lora'", "x": "then the folder", "lora": "name of a package"}[words[0]] in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "own.py").write_text("x = 1")
    with pytest.raises(vendor.VendorError, match="exists, and is no such copy"):
        vendor.write(["lora"], folder, [])
    with pytest.raises(vendor.VendorError, match="no package that"):
        vendor.changed(folder)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "own.py"]
    vendor.write(["ia3"], tmp_path / "copy", [])
    with pytest.raises(vendor.VendorError, match="--update"):
        vendor.write(["lora"], tmp_path / "copy", [])


def test_the_commit_is_minipefts_own(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "of a project that has minipeft installed"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(vendor, "SOURCE", tmp_path / "venv" / "minipeft")
    vendor.SOURCE.mkdir(parents=True)
    assert vendor.commit() is None


def test_listing_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vendor.main(["lora", "dora", "--list"]) == 0 == vendor.main(["lora", "there", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("methods/lora/dora.py") for line in lines) and "lines in" in lines[-1]
    assert not any(tmp_path.iterdir())


def test_checking_and_updating(tmp_path, capsys):
    copy = tmp_path / "lite"
    vendor.write(["lora", "kasa"], copy, [])
    assert vendor.main(["--check", str(copy)]) == 0
    (copy / "own.py").write_text("x = 1")  # what others put beside it is theirs
    changed = copy / "core" / "layer.py"
    changed.write_bytes(changed.read_bytes().replace(b"float32", b"float64", 1))
    (copy / "core" / "walk.py").unlink()
    assert vendor.changed(copy) == ["core/layer.py", "core/walk.py"]
    assert vendor.main(["--check", str(copy)]) == 1 and "core/layer.py" in capsys.readouterr().out
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert vendor.main(["--update", str(copy)]) == 2 and "--force" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert vendor.main(["--update", str(copy), "--force"]) == 0
    assert vendor.changed(copy) == [] and (copy / "own.py").exists()
    assert vendor.recorded(copy)[:2] == (["lora", "kasa"], [])


def test_an_update_removes_what_a_release_has_no_more_and_adds_what_is_new(tmp_path):
    copy = tmp_path / "lite"
    vendor.write(["ia3"], copy, [])
    record, old = copy / vendor.RECORD, copy / "maths" / "gone.py"
    old.parent.mkdir()
    old.write_bytes(b"")
    (copy / "core" / "walk.py").unlink()
    text = record.read_text()
    text = "\n".join(line for line in text.splitlines() if "core/walk.py" not in line)
    record.write_text(f"{text}\n| `maths/gone.py` | {hashlib.sha256(b'').hexdigest()} |\n")
    vendor.update(copy)
    assert not old.parent.exists() and (copy / "core" / "walk.py").exists() and not vendor.changed(copy)
    (copy / "core" / "walk.py").rename(tmp_path / "walk.py")
    record.write_text("\n".join(line for line in record.read_text().splitlines() if "core/walk.py" not in line) + "\n")
    shutil.copy(tmp_path / "walk.py", copy / "core" / "walk.py")
    with pytest.raises(vendor.VendorError, match=r"In the way.*walk\.py"):
        vendor.update(copy)
