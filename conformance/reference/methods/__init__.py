"""One file per method, found by itself: its cases, its formula, its shapes, its seeded faults."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache


@cache
def methods() -> dict:
    """All methods of the suite by name, in the order of their files' names."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        method = importlib.import_module(f"{__name__}.{module}").METHOD
        found[method.name] = method
    return found
