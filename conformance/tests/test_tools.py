"""Tolerances, NumPy layers, skeletons, reports and the pytest plugin."""

import json
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from conformance import commands
from conformance.record import recorder
from conformance.reference import bases, compare, draw, numpy_model
from conformance.run import cli
from conformance.run.checks.figures import figures


@pytest.mark.parametrize("command", commands.COMMANDS)
@pytest.mark.parametrize("argument", ["--nonsense", "--chekc"])
def test_no_command_takes_what_it_does_not_know(command, argument, monkeypatch):
    """Recording and freezing write over the golden data: a slip must not start them."""
    for module, function in ((commands, "open_driver"), (recorder, "record_bases"), (commands.json, "loads")):
        monkeypatch.setattr(module, function, lambda *a: pytest.fail(f"{command} began"))
    with pytest.raises(SystemExit) as e:
        commands.main([command, argument])
    assert e.value.code == 2


def test_recording_names_what_there_is(capsys):
    with pytest.raises(SystemExit):
        commands.main(["record", "lorra"])
    assert "no method or table lorra" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        commands.main(["record", "lora", "--formula", "package.module:METHOD", "folder"])
    assert "with --formula there is one method" in capsys.readouterr().err


def test_distance_is_per_row():
    want = np.array([[1000.0, 2000.0], [100.0, 200.0]])
    off = want.copy()
    off[1, 1] += 0.01  # 5e-5 of its own row, 5e-6 of the largest value
    assert compare.distance(off, want, "float32") > 1
    assert compare.distance(want * (1 + 2.0**-22), want, "float32") < 1


def recorded(**changes):
    """A pack of one case, as if it had been recorded, with changes of its tensors by part or of its fields."""
    tensors = {f"m/c|{part}|y": np.linspace(1, 2, 6).reshape(2, 3) for part in ("adapter", "out")}
    for part in tensors.keys() & {f"m/c|{part}|y" for part in changes}:
        tensors[part] = tensors[part] * changes[part.split("|")[1]]
    case = {"id": "m/c", "dtypes": ["float64"], "count": [1, 2], "effect": 0.5, "margin": 20.0, "agreement": 1e-16}
    case |= {key: value for key, value in changes.items() if key in case}
    return SimpleNamespace(data={"method": "m", "cases": [case]}, tensors=tensors)


@pytest.mark.parametrize(
    "change, fits",
    [({}, True), ({"out": 1 + 2.0**-52}, True), ({"agreement": 2e-16}, True), ({"margin": 20.01}, True),
     ({"out": 1 + 1e-12}, False), ({"adapter": 1 + 2.0**-52}, False), ({"margin": 12.0}, False),
     ({"count": [1, 3]}, False)],
)
def test_recording_anew_allows_for_rounding_alone(change, fits):
    assert (recorder.differences(recorded(**change), recorded()) == []) is fits


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.full((2, 2), np.nan), np.full((2, 2), np.inf)])
def test_distance_of_nonsense_is_infinite(bad):
    assert compare.distance(bad, np.ones((2, 2)), "float32") == float("inf")


@pytest.mark.parametrize("name", sorted(bases.BASES))
def test_numpy_model_is_torch_model(name):
    torch = pytest.importorskip("torch")
    from conformance import models

    base, rng = bases.BASES[name], np.random.default_rng(0)
    more: dict = {}
    if base.get("model") in numpy_model.LANGUAGE_MODELS:
        more["attention_mask"] = {"values": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}
    if name == "encoder-decoder":
        more |= {"decoder_input_ids": [[2, 4], 13], "decoder_attention_mask": {"values": [[1, 1, 1, 1], [1, 1, 0, 0]]}}
    weights, inputs = draw.draw_base(base, rng), draw.draw_inputs(base, more, rng)
    net = models.make(base).double()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    with torch.no_grad():
        first, *rest = ((k, torch.from_numpy(v)) for k, v in inputs.items())
        want = models.answer(net(first[1], **dict(rest))).numpy()
    assert compare.distance(numpy_model.run(base, weights, inputs), want, "float64") <= 1


@pytest.mark.parametrize("name", sorted({f["skeleton"] for f in figures()}))
def test_skeleton_is_the_real_model(name):
    transformers = pytest.importorskip("transformers")
    import torch

    from conformance.models import skeletons

    bert = transformers.BertConfig(vocab_size=28996)
    gpt2 = transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20)
    t5 = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    make = {"SEQ_CLS": lambda: transformers.BertForSequenceClassification(bert),
            "TOKEN_CLS": lambda: transformers.BertForTokenClassification(bert),
            "QUESTION_ANS": lambda: transformers.BertForQuestionAnswering(bert),
            "FEATURE_EXTRACTION": lambda: transformers.BertModel(bert),
            "CAUSAL_LM": lambda: transformers.GPT2LMHeadModel(gpt2),
            "SEQ_2_SEQ_LM": lambda: transformers.T5ForConditionalGeneration(t5)}[name.split("/")[1]]
    with torch.device("meta"):
        real, ours = make(), skeletons.make(name)
    assert {k: tuple(p.shape) for k, p in real.named_parameters()} == \
        {k: tuple(p.shape) for k, p in ours.named_parameters()}


def test_reports(tmp_path, capsys):
    paths = {k: tmp_path / f"report.{k}" for k in ("html", "json", "junit", "badge")}
    options = [f"--{k}={p}" for k, p in paths.items()]
    assert cli.main(["--impl", "oracle", "--profile", "core", "--methods", "ia3", *options]) == 0
    shown = capsys.readouterr().out
    assert "ia3" in shown and "PASSED" in shown
    page = paths["html"].read_text()
    assert "PEFT conformance: oracle" in page and "http://" not in page.replace("http://www.w3.org", "")
    lines = [json.loads(line) for line in paths["json"].read_text().splitlines()]
    assert lines[0]["results"] == len(lines) - 1
    suites = ElementTree.parse(paths["junit"]).getroot()
    assert sum(int(s.get("tests", 0)) for s in suites) == len(lines) - 1
    ElementTree.parse(paths["badge"])


def test_failures_are_told(tmp_path, capsys):
    page = tmp_path / "report.html"
    assert cli.main(["--impl", "conformance.drivers.broken:AlwaysWrong", "--profile", "core", "--methods", "ia3",
                     "--checks", "forward", f"--html={page}"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL ia3/linear/output:forward:float32" in shown and "expected" in shown
    assert "times the tolerance" in page.read_text()


def test_pytest_plugin():
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p",
                          "conformance.plugin", "--pyargs", "conformance",
                          "--impl", "oracle", "--profile", "core", "--methods", "ln_tuning", "-c", "/dev/null"],
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def test_seeded_fault_fails_in_pytest():
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p",
                          "conformance.plugin", "--pyargs", "conformance",
                          "--impl", "conformance.drivers.broken:AlwaysWrong", "--profile", "core", "--methods",
                          "ln_tuning", "-c", "/dev/null"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stdout + run.stderr
