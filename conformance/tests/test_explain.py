"""What `explain` prints is Python that holds the case's numbers and its whole formula."""

import shlex

import numpy as np
import pytest

from conformance import commands
from conformance.reference import formulas, store
from conformance.reference.compare import distance
from conformance.reference.methods import methods
from conformance.run import cli, explain, plan


def run(name):
    names: dict = {}
    exec(explain.page(name), names)
    return names


@pytest.mark.parametrize("method", methods().values(), ids=lambda m: m.name)
def test_the_printed_formula_gives_the_printed_output(method):
    """Nothing that the formula stands on is missing, and every literal is exact."""
    case = store.packs()[method.name].cases[0]
    names = run(f"{case.id}:forward")
    assert names["config"] == case.data["config"] and names["model"] == case.base
    arrays = {}
    for said, part in {"weights": "base", "adapter": "adapter", "inputs": "input", "out": "out"}.items():
        arrays[said] = {k: np.array(v) for k, v in names[said].items()}
        assert arrays[said].keys() == case.tensors(part).keys()
        assert all(np.array_equal(arrays[said][k], v) for k, v in case.tensors(part).items())
    prompt = method.prompt and method.prompt.formula
    given = {"formula": method.formula, "run": method.run, "route": method.route, "prompt": prompt}
    printed = {k: names[f.__name__] for k, f in given.items() if f}
    assert printed and all(f.__code__.co_filename == "<string>" for f in printed.values())
    y = formulas.output(
        method, names["model"], arrays["weights"], arrays["adapter"], case.config, arrays["inputs"], **printed
    )
    assert distance(y, arrays["out"]["y"], "float32") <= 1 or case.data.get("disputed")


@pytest.mark.parametrize(
    "check, said, part",
    [
        ("gradients", "gradients", "grad"),
        ("merge", "merged", "merged"),
        ("disable", "plain", "plain"),
        ("lifecycle", "second", "second"),
    ],
)
def test_what_a_check_compares(check, said, part):
    case = store.find("lora/linear/plain")
    found = run(f"{case.id}:{check}")[said]
    assert {k: np.array(v).tolist() for k, v in case.tensors(part).items()} == found
    assert f"def {'trace' if check == 'lifecycle' else check}(driver, case, dtype" in explain.page(f"{case.id}:{check}")


def test_facts():
    case = store.find("ia3/linear/output")
    assert run(f"{case.id}:names")["expected_parameters"] == case.parameters
    assert run(f"{case.id}:keys")["expected_keys"] == case.keys
    assert run(f"{case.id}:count")["expected_count"] == case.count


def test_every_kind_of_check_is_explained():
    """One of each, whatever is bound to it."""
    for check in dict.fromkeys(t.check for t in explain.all_tasks()):
        task = [t for t in explain.all_tasks() if t.check == check][-1]
        page = explain.page(f"{task.case}:{check}")
        compile(page, check, "exec")
        assert "# The check, " in page and explain.command(task, "minipeft") in page


@pytest.mark.parametrize("name", ["lora/linear/plain:merge", "ia3/law/run-is-merge", "ia3/reject/missing-tensor"])
def test_the_command_runs_this_case_alone(name, capsys, monkeypatch):
    words = explain.page(name, "oracle").partition("#   python -m conformance ")[2].splitlines()[0]
    ran: list = []

    def keep(driver, tasks, *more):
        ran.extend(tasks)
        return []

    monkeypatch.setattr(cli.runner, "run", keep)
    cli.main(["--in-process", *shlex.split(words)])
    assert {t.case for t in ran} == {name.partition(":")[0]} and len({t.check for t in ran}) == 1


def test_a_case_that_begins_as_another_is_told_apart():
    assert {t.case for t in plan.tasks("full", ["deft"], "deft/linear/para")} == {"deft/linear/para"}
    assert len({t.case for t in plan.tasks("full", ["deft"], "linear/para")}) == 2


def test_the_overview_names_the_checks(capsys):
    assert commands.main(["explain", "lora/linear/plain", "--impl", "peft"]) == 0
    shown = capsys.readouterr().out
    checks = ", ".join(dict.fromkeys(t.check for t in plan.tasks("full", ["lora"]) if t.case == "lora/linear/plain"))
    assert checks in shown and "--impl peft --methods lora --checks forward --cases lora/linear/plain" in shown


@pytest.mark.parametrize(
    "name, said",
    [
        ("lora/linear/rslroa", "did you mean 'lora/linear/rslora'?"),
        ("lora/linear/plain:mrge", "has no check 'mrge'; did you mean 'merge'?"),
    ],
)
def test_mistyped_names(name, said, capsys):
    with pytest.raises(SystemExit) as error:
        commands.main(["explain", name])
    assert error.value.code == 2 and said in capsys.readouterr().err
