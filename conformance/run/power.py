"""Does the suite catch faults? `python -m conformance power` runs every seeded fault and prints the kill matrix."""

from __future__ import annotations

from functools import cache

import numpy as np

from ..drivers.oracle import Oracle
from ..reference import compare, store
from ..reference.faults import all_faults
from . import plan
from .runner import run_one

COLUMNS = ("names", "keys", "count", "forward", "gradients", "merge", "unmerge", "disable", "save", "lifecycle",
           "states", "laws", "reject", "usage", "targets", "config", "beginnings")
MOST_CASES = 3  # of the rows meant for a fault
LAW_EXAMPLES = 4


def meant_cases(method, fault) -> list[str]:
    rows = fault.cases or [r.id for r in method.rows if fault.meant_for(r.id)]
    return [f"{method.name}/{r}" for r in rows[:MOST_CASES]]


def tasks_for(method, fault, meant, all_tasks):
    """The checks that are meant to catch a fault, on its cases, and all others on the first of them."""
    whole = {"laws", "reject"} & set(fault.caught_by)
    named = {f"{method.name}/{check}" for check in fault.caught_by}  # a single law, as law/dropout

    def wanted(t):
        if t.case in named:
            return True
        if t.check in whole and ("/law/" in t.case or "/reject/" in t.case):
            return True
        return t.dtype == fault.dtype and t.case in meant and (t.check in fault.caught_by or t.case == meant[0])

    return [t for t in all_tasks[method.name] if wanted(t)]


@cache
def everything() -> dict[str, list]:
    """The tasks of each method."""
    found: dict[str, list] = {}
    for t in [*plan.tasks("full", laws=False), *plan.law_tasks("full", None, examples=LAW_EXAMPLES)]:
        found.setdefault(t.method, []).append(t)
    return found


def kill_matrix(faults=None) -> list[dict]:
    """One row for each (method, fault), by default all: which checks saw it, and did every case meant for it?"""
    rows = []
    for method, fault in faults or all_faults():
        meant = meant_cases(method, fault)
        driver = Oracle(fault)
        seen: dict[str, set] = {}
        ran: dict[str, set] = {}
        broken: list[str] = []
        for t in tasks_for(method, fault, meant, everything()):
            ran.setdefault(t.check, set()).add(t.case)
            result = run_one(driver, t)
            if isinstance(result.raised, (AttributeError, NameError, TypeError)):
                broken.append(f"{t.id}, where the fault itself is broken: {result.message}")
            elif result.outcome in ("fail", "error"):
                seen.setdefault(t.check, set()).add(t.case)
        missed = broken
        for check in fault.caught_by:
            if check.startswith("law/"):
                missed += [] if f"{method.name}/{check}" in seen.get("laws", ()) else [check]
            elif check in ("laws", "reject", "lifecycle"):
                missed += [] if seen.get(check) or not ran.get(check) else [check]
            else:
                missed += [f"{c}:{check}" for c in meant
                           if c in ran.get(check, ()) and c not in seen.get(check, ())]
        rows.append({"fault": f"{method.name}/{fault.id}", "what": fault.what, "link": fault.link,
                     "checks": {c: len(seen.get(c, ())) for c in COLUMNS if c in ran}, "missed": missed,
                     "caught": bool(seen) and not missed})
    return rows


def smallest_scale_error() -> dict:
    """Per dtype: the least relative error of an adapter's whole effect that the forward check of every case sees."""
    worst = dict.fromkeys(compare.EPS, 0.0)
    for case in store.all_cases():
        y, plain = case.tensors("out")["y"], case.tensors("plain")["y"]
        if y.shape != plain.shape:
            continue
        for dtype in worst:
            per_unit = compare.distance(y + (y - plain), y, dtype)  # an error of 100% in tolerances
            worst[dtype] = max(worst[dtype], 1 / per_unit)
    return worst


def typical_scale_error() -> dict:
    """The same for the median case."""
    found: dict[str, list] = {d: [] for d in compare.EPS}
    for case in store.all_cases():
        y, plain = case.tensors("out")["y"], case.tensors("plain")["y"]
        if y.shape == plain.shape:
            for d in found:
                found[d].append(1 / compare.distance(y + (y - plain), y, d))
    return {d: float(np.median(v)) for d, v in found.items()}


def show(rows) -> str:
    width = max(len(r["fault"]) for r in rows)
    lines = [" " * width + "  " + " ".join(c[:5].ljust(5) for c in COLUMNS)]
    for r in rows:
        cells = [str(r["checks"][c] or ".") if c in r["checks"] else "" for c in COLUMNS]
        lines.append(r["fault"].ljust(width) + "  " + " ".join(c.ljust(5) for c in cells)
                     + ("" if r["caught"] else "  NOT CAUGHT by " + ", ".join(r["missed"] or ["anything"])))
    return "\n".join(lines)


def main() -> int:
    rows = kill_matrix()
    print("How many cases of each check saw the fault; '.': the check ran and saw nothing.\n")
    print(show(rows))
    real = sum(bool(r["link"]) for r in rows)
    caught = sum(r["caught"] for r in rows)
    print(f"\n{caught} of {len(rows)} faults caught by the cases meant for them; {real} are real bugs.")
    smallest, typical = smallest_scale_error(), typical_scale_error()
    for d in smallest:
        print(f"{d}: a scale error of {smallest[d]:.2g} is caught by every forward case, of {typical[d]:.2g} by half")
    return 0 if caught == len(rows) else 1
