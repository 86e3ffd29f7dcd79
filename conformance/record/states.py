"""Record which adapters are active, what parameters are there and what is trained, after each step of `states`."""

from __future__ import annotations

import json
from pathlib import Path

from ..driver import Driver
from ..reference import store
from ..reference.methods import methods
from ..run.checks import states


def place(found: list, item) -> int:
    """The index of an item in a list, which it is added to if it is new."""
    if item not in found:
        found.append(item)
    return found.index(item)


def record_case(driver: Driver, case, method) -> dict | str:
    """The states of one case; a text where the reference fails: why.

    What is trained follows from which adapters there are and which are on, whatever led there: where the reference says
    once this and once that, the first is recorded.
    """
    names: list = []
    trained: list = []
    steps = []
    said: dict = {}
    try:
        for what, whose, *_ in states.walk(driver, case, method, "float32"):
            now = states.state(driver)
            there = place(names, now["names"])
            first = said.setdefault((whose == "plain", *now["active"], there), now["trained"])
            steps.append([what, now["active"], there, place(trained, first)])
    except Exception as e:
        return f"after '{steps[-1][0] if steps else 'nothing'}': {type(e).__name__}: {str(e)[:160]}"
    return {"steps": steps, "names": names, "trained": trained}


def record(driver: Driver, folder: Path, check: bool = False) -> list[str]:
    """Write `states.json`; with `check`, tell how it differs from what is stored."""
    info = driver.info()
    found: dict = {"library": info["name"], "version": info["version"], "cases": {}, "left_out": {}}
    for case in store.all_cases():
        method = methods()[case.pack.data["method"]]
        if states.worth_recording(case, method):
            told = record_case(driver, case, method)
            found["left_out" if isinstance(told, str) else "cases"][case.id] = told
    if check:
        old = store.states()
        changed = [k for k in {**found["cases"], **old["cases"]} if found["cases"].get(k) != old["cases"].get(k)]
        return [f"states.json: {k} is not as recorded" for k in sorted(changed)]
    (folder / "states.json").write_text(json.dumps(found, indent=None).replace("{\"steps\"", "\n{\"steps\"") + "\n")
    store.states.cache_clear()
    return []
