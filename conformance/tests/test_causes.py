"""A newcomer's mistakes, planted into the example of a port: the report names each, once."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import conformance
from conformance.driver import Driver, Rejected, Unsupported
from conformance.drivers.oracle import Oracle
from conformance.reference import compare
from conformance.reference.faults import GENERAL
from conformance.reference.methods import methods
from conformance.run import causes, cli, plan, runner
from conformance.run.reporting import terminal

SOURCE = Path(conformance.__path__[0], "examples/numpy_lora.py").read_text()
CASES = "lora/linear/plain", "lora/linear/rslora", "lora/law/run-is-merge", "lora/law/deepcopy", "lora/reject/missing"
TASKS = [
    t for t in plan.tasks("core", ["lora"], dtypes=["float32"]) if t.case.startswith(CASES) and t.check != "gradients"
]
SCALE = 'alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)'
BIAS = 'self.W.get(name + ".bias", 0)'
ADAPTED = "PREFIX + name + '.lora_A.weight' in self.adapter"
RUN, MERGED = "(x @ A.T @ B.T)", "(B @ A)"


def keys(a, b):
    return [
        (".lora_A.weight", f".{a}"),
        (".lora_B.weight", f".{b}"),
        ('for x in "AB"', f"for x in {[a, b]}"),
        ("{layer}.lora_{x}.weight", "{layer}.{x}"),
    ]


MISTAKES = {  # what is written instead of what: what the report says, and how many of its entries may be about the rest
    "B used for B^T": ([(RUN, "(x @ A.T @ B)")], "lora/b-transposed: B is used where B^T belongs", 0),
    "B read in the other order": (
        [(RUN, "(x @ A.T @ B.reshape(B.shape[::-1]))"), (MERGED, "(B.reshape(B.shape[::-1]).T @ A)")],
        "lora/b-by-columns: B's numbers are read as those of a matrix (r, out)",
        0,
    ),
    "B held as (r, out)": (
        [("np.zeros((out, r)", "np.zeros((r, out)")],
        "b-held-transposed: lora_B is held and saved as (r, out)",
        1,
    ),
    "delta transposed": (
        [(RUN, "(x @ (B @ A if len(A[0]) == len(B) else (B @ A).T))")],
        "lora/transposed: the delta of a square layer is transposed",
        1,
    ),
    "bias lost": (
        [(BIAS, f"(0 if {ADAPTED} else {BIAS})")],
        "bias-lost: an adapted layer is run without its own bias",
        0,
    ),
    "bias lost while running": (
        [
            (
                BIAS,
                f"(0 if {ADAPTED} and not (self.off or self.merged) else {BIAS})",
            )
        ],
        "bias-lost-while-running: an adapted layer is run without its own bias, but for when it is merged or off",
        0,
    ),
    "every bias lost": ([(BIAS, "0")], "every-bias-lost: all layers are run without their bias", 0),
    "alpha": ([(SCALE, "alpha")], "lora/alpha-not-over-r: the scale is alpha, not alpha / r", 0),
    "no scale": ([(SCALE, "1.0")], "lora/unscaled: there is no scale, B A is added as it is", 0),
    "scale twice": ([(SCALE, f"({SCALE}) ** 2")], "lora/scaled-twice: the scale is applied twice", 0),
    "no rslora": ([(SCALE, "alpha / r")], "lora/rslora-ignored: use_rslora is read as False", 0),
    "no prefix": (
        [('PREFIX = "base_model.model."', 'PREFIX = ""')],
        "keys-without-prefix: saved keys lack base_model.model.",
        0,
    ),
    "adapter in keys": (
        keys("lora_A.default.weight", "lora_B.default.weight"),
        "keys-with-adapter-name: saved keys hold the adapter's name",
        0,
    ),
    "no weight in keys": (keys("lora_A", "lora_B"), "keys-without-weight: saved keys lack .weight at their end", 0),
    "other names": (
        keys("lora_down.weight", "lora_up.weight"),
        "keys-renamed: saved keys say lora_down for lora_A and lora_up for lora_B",
        0,
    ),
    "merge forgotten": (
        [("        self.change(+1)\n", "")],
        "merge-does-nothing: merging changes a copy of the weights",
        2,
    ),
    "merged and run": ([(" and not self.merged and", " and")], "merged-and-running: a merged adapter is run, too", 0),
    "unmerge forgotten": (
        [("self.W, self.merged = self.before, False", "self.merged = False")],
        "unmerge-does-nothing: unmerging leaves the merged weights",
        1,
    ),
}


def example(changes):
    """The example's model, changed, as a driver in this process."""
    source = SOURCE
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    names: dict = {"__name__": "example"}
    exec(source.replace("raise ValueError", "raise Rejected"), names)
    names |= {"Unsupported": Unsupported, "Rejected": Rejected}
    return type("Example", (names["Model"], Driver), {})()


def report(driver, tasks=TASKS):
    results = runner.run(driver, tasks)
    causes.name_causes(tasks, results)
    return results, terminal.grouped(r for r in results if r.outcome in ("fail", "error"))


def test_the_example_is_right():
    assert report(example([]))[1] == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_once(mistake):
    changes, said, others = MISTAKES[mistake]
    results, groups = report(example(changes))
    assert groups[0][0].cause == said
    assert len([g for g in groups if not g[0].cause]) <= others, [g[0].message for g in groups]
    assert len([g for g in groups if g[0].cause]) == 1
    shown = terminal.failures(results)
    assert shown.count("Likely mistake: ") == shown.count("Likely mistake: " + said.partition(": ")[2]) == 1


@pytest.mark.parametrize("name", ["lora", "ia3", "prompt_tuning", "vera"])
def test_every_fault_of_a_method_is_called_by_its_name(name):
    for fault in methods()[name].faults:
        case = f"{name}/{[*fault.cases, *(r.id for r in methods()[name].rows if fault.meant_for(r.id))][0]}"
        tasks = [t for t in plan.tasks("full", [name], case, ["float32"]) if t.check in fault.caught_by]
        results, _ = report(Oracle(fault), tasks)
        assert {r.cause for r in results if r.outcome != "pass"} == {f"{name}/{fault.id}: {fault.what}"}


@pytest.mark.parametrize(
    "id",
    [
        "missing-accepted",
        "extra-accepted",
        "nan-accepted",
        "loads-anything",
        "a-held-transposed",
        "unmerge-does-nothing",
        "gradient-halved",
    ],
)
def test_a_general_fault_is_told_from_its_like(id):
    fault = next(f for f in GENERAL if f.id == id)
    tasks = [
        t
        for t in plan.tasks("core", ["lora"], dtypes=["float32"])
        if t.check in (*fault.caught_by, "merge") and (t.check == "reject" or t.case == "lora/linear/plain")
    ]
    _, groups = report(Oracle(fault), tasks)
    assert [g[0].cause for g in groups] == [f"{id}: {fault.what}"]


def test_in_every_dtype():
    fault = next(f for f in methods()["ia3"].faults if f.id == "one-plus")
    case = next(f"ia3/{r.id}" for r in methods()["ia3"].rows if fault.meant_for(r.id) and r.profile == "core")
    tasks = [t for t in plan.tasks("full", ["ia3"], case) if t.check == "forward"]
    assert {t.dtype for t in tasks} == {"float64", "float32", "bfloat16", "float16"}
    results, groups = report(Oracle(fault), tasks)
    assert len(groups) == 1 and all(r.cause for r in results)


def test_one_general_mistake_is_one_entry_over_all_methods():
    fault = next(f for f in GENERAL if f.id == "keys-without-prefix")
    tasks = [t for t in plan.tasks("core", ["lora", "ia3", "oft"], dtypes=["float32"]) if t.check == "keys"]
    _, groups = report(Oracle(fault), tasks)
    assert len(groups) == 1 and {r.method for r in groups[0]} == {"lora", "ia3", "oft"}


def test_a_program_s_mistake_is_told_everywhere(tmp_path, capsys):
    """The whole way: a port that is a program, the terminal, the page, the JSON lines."""
    program, page, lines, junit = (tmp_path / name for name in ("port.py", "page.html", "lines.jsonl", "junit.xml"))
    program.write_text(SOURCE.replace(SCALE, "alpha"))
    chosen = "--cases lora/linear/plain --methods lora --checks forward,merge".split()
    written = [f"--html={page}", f"--json={lines}", f"--junit={junit}"]
    assert cli.main(["--impl", f"cmd:{sys.executable} {program}", *chosen, *written]) == 1
    fault, what = "lora/alpha-not-over-r", "the scale is alpha, not alpha / r"
    shown = capsys.readouterr().out
    assert shown.count("Likely mistake: ") == 1 and what in shown and fault in shown
    assert "explain lora/linear/plain:forward" in shown
    assert page.read_text().count(f"<summary><b>4 results</b>likely mistake: {what}</summary>") == 1
    assert junit.read_text().count(f"likely mistake: {fault}: {what}") == 4
    told = [json.loads(line) for line in lines.read_text().splitlines()[1:]]
    assert {r["cause"] for r in told if r["outcome"] == "fail"} == {f"{fault}: {what}"}
    assert all("raised" not in r for r in told)


def test_no_cause_is_made_up():
    """Another wrong answer than any fault's gets no cause."""
    results, groups = report(example([(SCALE, f"1.37 * {SCALE}")]))
    assert groups and not any(r.cause for r in results)
    assert len(groups) == 1, "all that follows from a wrong output is told with it"


def test_values_shown_are_those_at_the_worst_place():
    want = np.arange(40, dtype=float).reshape(2, 20) + 1
    got = want.copy()
    got[1, 17] = 7.5
    got[0, 2] += 2.0  # the larger error of its row, which is the smaller one
    with pytest.raises(compare.Failure) as failure:
        compare.close("y", got, want, "float32")
    assert "at [1, 17]: got 7.5, expected 38" in failure.value.message
    assert "7.5" in failure.value.got and failure.value.got.endswith("at [1, 14:20]")
    assert "38." in failure.value.expected and failure.value.expected.endswith("at [1, 14:20]")


def test_the_worst_row_is_the_one_furthest_off_its_own_scale():
    want = np.array([[1000.0, 2000.0], [100.0, 200.0]])
    got = want + np.array([[0.0, 0.02], [0.0, 0.01]])
    assert compare.first_difference(got, want).startswith("at [1, 1]")


def test_what_is_not_finite_is_shown():
    got = np.ones((2, 3))
    got[1, 1] = np.nan
    assert (
        compare.first_difference(got, np.ones((2, 3))) == "1 of 6 values are not finite; at [1, 1]: got nan, expected 1"
    )
