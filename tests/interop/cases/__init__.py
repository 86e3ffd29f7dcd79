"""The table of cases. Every test of this folder runs over all of it: a method is tested by adding rows.

Each file of this folder holds the rows of one group in a list `CASES`; `REFUSED` (optional) lists what peft refuses.
"""

import importlib
import pkgutil

import pytest

from .case import Case, Refused

CASES: list[Case] = []
REFUSED: list[Refused] = []
for _, _name, _ in sorted(pkgutil.iter_modules(__path__), key=lambda m: m[1]):
    if _name != "case":
        _rows = importlib.import_module(f"{__name__}.{_name}")
        CASES += _rows.CASES
        REFUSED += getattr(_rows, "REFUSED", [])

_ids = [c.id for c in CASES + REFUSED]
if len(set(_ids)) != len(_ids):
    raise ValueError(f"two cases with one id: {sorted({i for i in _ids if _ids.count(i) > 1})}")


def each_case(where=lambda case: True):
    """Parametrise a test over the rows for which `where` holds; the test takes a `case` argument."""
    rows = [c for c in CASES if where(c)]
    return pytest.mark.parametrize("case", rows, ids=[c.id for c in rows])


def firsts(parts: int, cases=CASES) -> set[str]:
    """The first of `cases` of each method (1), or of each method on each kind of base model (2)."""
    groups: dict[tuple, Case] = {}
    for case in cases:
        groups.setdefault(tuple(case.id.split("/")[:parts]), case)
    return {case.id for case in groups.values()}
