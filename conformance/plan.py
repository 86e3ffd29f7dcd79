"""Which checks a run consists of."""

from __future__ import annotations

from functools import partial

from . import store
from .checks import goldens
from .runner import Task

PROFILES = ("core", "full")


def golden_tasks(cases, profile: str, dtypes) -> list[Task]:
    tasks = []
    for case in cases:
        for check, (function, every) in goldens.CHECKS.items():
            if not goldens.applies(case, check):
                continue
            wanted = [d for d in dtypes if d in case.dtypes] if every and profile == "full" else ["float32"]
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


def tasks(profile: str, methods=None, pattern=None, dtypes=("float64", "float32", "bfloat16")) -> list[Task]:
    return golden_tasks(cases(profile, methods, pattern), profile, dtypes)
