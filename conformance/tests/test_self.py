"""The suite, run on implementations of known quality, reports each as it should."""

import contextlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from conformance import serve
from conformance.driver import Driver, Unsupported
from conformance.drivers import broken, open_driver
from conformance.drivers.oracle import Oracle
from conformance.drivers.process import Process
from conformance.run import plan, runner

LORA = plan.tasks("core", ["lora"], dtypes=["float32"])


def outcomes(driver, tasks, seconds=30.0):
    results = runner.run(driver, tasks, seconds=seconds)
    driver.close()
    return runner.verdict(results), results


@pytest.mark.parametrize("method", plan.all_methods())
def test_right(method):
    (good, _), results = outcomes(Oracle(), plan.tasks("core", [method], dtypes=["float32"]))
    assert good, [f"{r.id}: {r.message}" for r in results if r.outcome in ("fail", "error")]


def test_the_oracle_is_right_about_all_rows_of_the_tables():
    """The whole tables, not the core alone: `rules.py` has no golden but these."""
    tables = ("targets", "config", "beginnings", "refused")
    tasks = [t for t in plan.tasks("full", dtypes=["float32"], laws=False) if t.check in tables]
    (good, counts), results = outcomes(Oracle(), tasks)
    assert good and counts["unsupported"] <= 1, [r.id for r in results if r.outcome != "pass"]


def test_always_wrong():
    tasks = [t for t in plan.tasks("core", dtypes=["float32"]) if t.check not in ("laws", "reject", "figures")]
    (good, counts), results = outcomes(broken.AlwaysWrong(), tasks)
    assert not good
    assert not counts["pass"], [r.id for r in results if r.outcome == "pass"]


def test_nothing_passes_that_asks_nothing():
    """On a driver that claims nothing, no check of the full profile passes, and none asks a right one nothing."""
    tasks = [t for t in plan.tasks("full") if t.dtype == "float32"]
    driver = broken.AlwaysUnsupported()
    assert not [r.id for r in runner.run(driver, tasks) if r.outcome == "pass"]
    monitored = runner.Watched(driver)
    for task in (t for t in tasks if t.check == "usage"):
        monitored.driver, monitored.asked = broken.AlwaysUnsupported(), False
        monitored.driver.info = lambda: {"name": "all", "version": "0", "dtypes": list(plan.DTYPES)}
        with contextlib.suppress(Unsupported):
            task.call(monitored)
        assert monitored.asked, task.id


def test_always_unsupported():
    (good, counts), _ = outcomes(broken.AlwaysUnsupported(), LORA)
    assert set(counts) == {"unsupported"}
    assert not good, "a run in which nothing ran must fail"


def test_crash_is_an_error_and_no_rejection():
    (good, counts), _ = outcomes(broken.Raising(), LORA)
    assert not good and set(counts) == {"error"}


def test_dying_process():
    driver = Process([sys.executable, "-m", "conformance.serve", "conformance.drivers.broken:Dying"])
    (good, counts), results = outcomes(driver, LORA[:2])
    assert not good and set(counts) == {"error"}
    assert "ended with status 139" in results[0].message


def test_hanging_in_process():
    (good, counts), results = outcomes(broken.Hanging(), LORA[:2], seconds=0.2)
    assert not good and set(counts) == {"error"} and "hung" in results[0].message


def test_hanging_process():
    driver = Process([sys.executable, "-m", "conformance.serve", "conformance.drivers.broken:Hanging"])
    (good, counts), results = outcomes(driver, LORA[:1], seconds=2.0)
    assert not good and set(counts) == {"error"} and "hung" in results[0].message


def test_no_tasks_is_a_failure():
    assert runner.verdict([])[0] is False


def test_known_issue_that_passes_fails_the_run():
    issue = {"results": ["lora/linear/plain:forward:*"], "what": "said to be wrong", "link": "https://example.org"}
    task = next(t for t in LORA if t.id == "lora/linear/plain:forward:float32")
    result = runner.apply_known(runner.run_one(Oracle(), task), [issue])
    assert result.outcome == "fail" and "known issue, and passes" in result.message


def test_known_issue_that_depends_on_the_machine_may_pass():
    issue = {"results": ["lora/linear/plain:forward:*"], "what": "", "link": "https://example.org", "sometimes": "why"}
    task = next(t for t in LORA if t.id == "lora/linear/plain:forward:float32")
    assert runner.apply_known(runner.run_one(Oracle(), task), [issue]).outcome == "pass"


@pytest.mark.parametrize("version, wanted, fits", [
    ("0.21.2", "0.21.2", True), ("0.21.20", "0.21.2", False), ("0.21.2.dev0", "0.21.2", True),
    ("0.15.2", ">= 0.15, <= 0.21.2", True), ("0.9.0", ">= 0.15", False), ("0.22.0", "<= 0.21.2", False),
    ("0.20.0", "< 0.20", False), ("0.19.1", "< 0.20", True), ("unknown", "<= 1", True)])
def test_ranges_of_versions(version, wanted, fits):
    assert runner.in_range(version, wanted) is fits


def test_known_issue_needs_link_and_evidence():
    import json
    from pathlib import Path

    for issue in json.loads((Path(runner.__file__).parent / "known_issues.json").read_text())["issues"]:
        assert issue["link"].startswith("https://") and len(issue["evidence"]) > 20 and issue["results"], issue["what"]


def test_serve_gives_the_same_as_in_process():
    tasks = [t for t in LORA if t.check in ("keys", "forward", "merge", "save")][:12]
    driver = Process([sys.executable, "-m", "conformance.serve", "oracle"])
    (good, counts), _ = outcomes(driver, tasks)
    assert good and counts["pass"] == len(tasks)


def test_whole_checks_in_the_process_find_what_operations_find():
    tasks = [t for t in LORA if t.check in ("keys", "forward", "merge", "laws", "usage", "reject")][::6]
    for name in ("oracle", "conformance.drivers.broken:AlwaysWrong", "conformance.drivers.broken:AlwaysUnsupported"):
        _, whole = outcomes(open_driver(name, sys.executable, "core"), tasks)
        _, steps = outcomes(open_driver(name, sys.executable), tasks)
        one, other = ([(r.id, r.outcome, runner.masked(re.sub(r"\btmp\w+", "", r.message))) for r in results]
                      for results in (whole, steps))
        assert one == other


def test_whole_checks_that_crash_or_hang_are_reported():
    for name, said in (("Dying", "ended with status 139"), ("Hanging", "hung"), ("Raising", "crashed")):
        driver = open_driver(f"conformance.drivers.broken:{name}", sys.executable, "core")
        _, results = outcomes(driver, LORA[:2], seconds=3.0)
        assert {r.outcome for r in results} == {"error"} and said in results[0].message


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_goes_on_twice_answers_for_no_other_check():
    tasks = [t for t in LORA if t.case == "lora/linear/plain" and t.check in ("names", "keys", "count")]
    driver = open_driver("conformance.drivers.broken:Forking", sys.executable, "core")
    _, results = outcomes(driver, tasks)
    assert {r.check: r.outcome for r in results}["count"] in ("fail", "error")


def test_arrays_that_no_file_holds_are_errors():
    with pytest.raises(TypeError, match="complex128"):
        serve.carried(np.ones(2, complex))


def test_a_failure_that_does_not_come_again_is_one():
    class Once(Oracle):
        def _passes(self, task):
            return "fail: by chance"

    (good, _), results = outcomes(Once(), LORA[:1])
    assert not good and "the first time: fail: by chance" in results[0].message


def test_what_a_check_gives_and_gets_in_the_process_is_its_own():
    """As over the protocol: a driver that changes its arguments or hands out its own arrays changes nothing here."""
    class Changes(Driver):
        kept = np.zeros(2)

        def forward(self, inputs, adapter_names=None):
            inputs["x"][:] = 7
            adapter_names.append("more")
            return self.kept

    given, names, driver = {"x": np.ones(2)}, ["a"], serve.AsIfApart(Changes())
    driver.forward(given, names)[:] = 5
    assert given["x"].tolist() == [1, 1] and names == ["a"] and Changes.kept.tolist() == [0, 0]


def test_numpy_example():
    import conformance

    example = f"{conformance.__path__[0]}/examples/numpy_lora.py"
    (good, counts), _ = outcomes(Process([sys.executable, example]), plan.tasks("core", ["lora"], dtypes=["float32"]))
    assert good and counts["pass"] > 15 and counts["unsupported"]


@pytest.mark.parametrize("module", ["minipeft", "peft", "transformers", "torch"])
def test_suite_imports_without(module):
    """Planning, formulas and the oracle need none of these."""
    code = (f"import sys; sys.modules[{module!r}] = None\n"
            "from conformance.record import coverage\n"
            "from conformance.reference import formulas\n"
            "from conformance.run import cli, plan, power, runner\n"
            "from conformance.drivers import open_driver\n"
            "driver = open_driver('oracle')\n"
            "tasks = [t for t in plan.tasks('core', ['lora']) if t.check == 'forward']\n"
            "assert runner.verdict(runner.run(driver, tasks))[0]\n"
            f"assert sys.modules[{module!r}] is None")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
