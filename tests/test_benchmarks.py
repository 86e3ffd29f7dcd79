"""The command that measures minipeft beside peft: on layers so small that its figures mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import minipeft
from benchmarks.__main__ import summary, worse
from benchmarks.methods import METHODS
from benchmarks.page import page
from minipeft.core import registry
from minipeft.core.adapter import ADAPTERS

ROOT = Path(__file__).parents[1]


def test_the_command(tmp_path):
    pytest.importorskip("peft")
    kept = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--json", str(kept), "--width", "64", "--rounds", "1",
               "--only", "methods", "mixed", "many", "compiled", "--methods", "lora", "ia3", "lily", "--adapters", "12",
               "--backend", "eager"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(kept.read_text())
    results = report["results"]
    assert not report["failures"]
    for quantity in ("lora: step", "ia3: merge, peak", "lily: forward", "mixed batch of 64", "load adapter 12"):
        assert results[quantity]["values"].keys() == {"minipeft", "peft"}
        assert f"<td>{quantity}</td>" in kept.with_suffix(".html").read_text()
    assert "lily: merge" not in results
    for method in ("lora", "ia3"):
        assert results[f"{method}: graphs"]["median"]["minipeft"] == 1
        assert results[f"{method}: graphs after the warm-up"]["median"]["minipeft"] == 0
    assert results["lora: merge, peak"]["median"]["minipeft"] < results["lora: merge, peak"]["median"]["peft"]


def row(*ours):
    return summary({"unit": "seconds", "values": {"minipeft": list(ours), "peft": [2.0] * len(ours)}}, "minipeft")


def test_what_counts_as_worse():
    """A ratio is compared by its median: one slow round is none, 15% is not yet too much."""
    recorded = {"a": row(1.0, 1.0, 1.0), "b": row(1.0, 1.0, 1.0), "c": row(1.0), "gone": row(1.0)}
    now = {"a": row(1.0, 9.0, 1.14), "b": row(1.2, 1.2, 0.9), "c": row(1.14), "new": row(9.0)}
    assert worse(now, recorded) == {"b": (0.5, 0.6)}
    assert now["a"]["ratio"] == {"median": 0.57, "least": 0.5, "most": 4.5}


def test_the_page_shows_what_is_measured_of_one_alone():
    machine = {"device": "<a>", "libraries": ["minipeft", "peft"], "versions": {}, "width": 8, "rounds": 1}
    only = summary({"unit": "times", "values": {"minipeft": [1.5]}}, "minipeft")
    shown = page({"machine": machine, "results": {"x < y": only}})
    assert "x &lt; y" in shown and "&lt;a&gt;" in shown and "1.5 times" in shown and "<svg" not in shown


def test_every_method_of_linear_layers_is_measured():
    registry.load_all()
    measured = {getattr(minipeft, cls)._method for cls, _ in METHODS.values()}
    elsewhere = {"TRAINABLE_TOKENS", "SHADOW", "XLORA", "POLY"}  # not such layers, or a model that takes `task_ids`
    for method, (cls, *_) in ADAPTERS.items():
        if cls.__module__.startswith("minipeft.") and {"Linear"} <= set(cls.bases) and method.value not in elsewhere:
            assert method in measured, method
