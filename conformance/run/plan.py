"""Which checks a run consists of."""

from __future__ import annotations

from functools import partial

from ..reference import laws, store
from ..reference.methods import methods as all_methods
from .checks import beginnings, config, figures, goldens, lifecycle, refused, reject, states, targets, usage
from .runner import Task

PROFILES = ("core", "full")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def in_dtype(case, check: str, dtype: str) -> bool:
    """float16 is bfloat16 with other rounding: a sample is enough."""
    if dtype == "float16":
        return "bfloat16" in case.dtypes and case.profile == "core" and check in ("forward", "merge")
    return dtype in case.dtypes


def golden_tasks(cases, profile: str, dtypes) -> list[Task]:
    tasks = []
    for case in cases:
        for check, (function, every) in goldens.CHECKS.items():
            if not goldens.applies(case, check):
                continue
            wanted = [d for d in dtypes if in_dtype(case, check, d)] if every and profile == "full" else ["float32"]
            tasks += [Task(case.pack.data["method"], case.id, check, d, partial(bound, function, case, d))
                      for d in wanted]
    return tasks


def bound(function, case, dtype, driver):
    function(driver, case, dtype)


def cases(profile: str = "full", methods=None, pattern: str | None = None) -> list:
    return [c for c in store.all_cases()
            if (profile == "full" or c.profile == "core")
            and (not methods or c.pack.data["method"] in methods)
            and (not pattern or pattern in c.id)]


def lifecycle_tasks(cases) -> list[Task]:
    return [Task(m.name, c.id, "lifecycle", "float32", partial(bound, partial(lifecycle.trace, method=m), c, "float32"))
            for c in cases if c.data.get("trace") for m in [all_methods()[c.pack.data["method"]]]]


def state_tasks(cases) -> list[Task]:
    return [Task(m.name, c.id, "states", "float32", partial(bound, partial(states.check, method=m), c, "float32"))
            for c in cases if states.applies(c) for m in [all_methods()[c.pack.data["method"]]]]


def law_tasks(profile, methods, pattern=None, examples=None) -> list[Task]:
    examples = examples or laws.EXAMPLES[profile]
    found = []
    for m in all_methods().values():
        for name, law in laws.laws().items():
            case = f"{m.name}/law/{name.replace('_', '-')}"
            if law.applies(m) and (not methods or m.name in methods) and (not pattern or pattern in case):
                number = min(examples, getattr(law, "MOST", examples))
                found.append(Task(m.name, case, "laws", "float32", partial(laws.hold, law, m, number)))
    return found


def reject_tasks(cases, pattern=None) -> list[Task]:
    """Damaged tensors for one case of every method; damaged configs and files for LoRA's plain one."""
    found, seen = [], set()
    for case in cases:
        method = case.pack.data["method"]
        if case.data.get("live"):
            continue
        kinds: dict = {reject.bad_load: reject.LOAD} if method not in seen else {}
        if case.id == "lora/linear/plain":
            kinds |= {reject.bad_config: reject.CONFIG, reject.bad_file: reject.FILES}
        seen.add(method)
        for function, what in ((function, what) for function, table in kinds.items() for what in table):
            name = f"{method}/reject/{what.replace(' ', '-')}"
            if not pattern or pattern in name:
                call = partial(bound, partial(function, what=what), case, "float32")
                found.append(Task(method, name, "reject", "float32", call))
    return found


def usage_tasks(profile, methods, pattern=None) -> list[Task]:
    """In the core profile, LoRA's alone, and what needs a further library in none."""
    found = []
    for m, what, function in usage.everything():
        case = f"{m.name}/usage/{what}"
        core = m.name == "lora" and what not in usage.KINDS and not what.startswith(usage.FULL)
        if (core or profile == "full") and (not methods or m.name in methods) and (not pattern or pattern in case):
            found.append(Task(m.name, case, "usage", "float32", function))
    return found


def figure_tasks(methods, pattern) -> list[Task]:
    found = []
    for figure in figures.figures():
        method = figure["config"]["peft_type"].lower()
        for kind, function in figures.KINDS.items():
            case = f"{method}/figures/{figure['id']}/{kind}"
            if (not methods or method in methods) and (not pattern or pattern in case):
                found.append(Task(method, case, "figures", "float32", partial(bound_figure, function, figure)))
    return found


def row_tasks(check: str, rows, function, profile, methods, pattern) -> list[Task]:
    """Checks of rows that have a method and an id of their own."""
    found = []
    for row in rows:
        case = f"{row['method']}/{check}/{row['id']}"
        if (profile == "full" or row["profile"] == "core") and (not methods or row["method"] in methods) \
                and (not pattern or pattern in case):
            found.append(Task(row["method"], case, check, "float32", partial(bound_figure, function, row)))
    return found


def config_tasks(profile, methods, pattern) -> list[Task]:
    return [t for kind, function in config.CHECKS.items()
            for t in row_tasks("config", [{**r, "id": kind} for r in store.configs().values()], function, profile,
                               methods, pattern)]


def bound_figure(function, figure, driver):
    function(driver, figure)


def tasks(profile: str, methods=None, pattern=None, dtypes=DTYPES, laws=True):
    """All tasks of a profile, in the order they are run.

    `pattern`: those whose case contains this text; of a case that is called just so, those alone.
    """
    chosen = cases(profile, methods, pattern)
    found = [*golden_tasks(chosen, profile, dtypes), *lifecycle_tasks(chosen), *state_tasks(chosen),
             *(law_tasks(profile, methods, pattern) if laws else ()),
             *reject_tasks(cases(profile, methods), pattern),
             *usage_tasks(profile, methods, pattern),
             *row_tasks("targets", store.rows("targets"), targets.check, profile, methods, pattern),
             *row_tasks("beginnings", store.rows("beginnings"), beginnings.check, profile, methods, pattern),
             *row_tasks("refused", store.rows("refused"), refused.check, profile, methods, pattern),
             *config_tasks(profile, methods, pattern),
             *(figure_tasks(methods, pattern) if profile == "full" else ())]
    return [t for t in found if t.case == pattern] or found
