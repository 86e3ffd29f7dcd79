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


def record(driver: Driver, folder: Path, names, only_new: bool = False, check: bool = False) -> list[str]:
    """Write the states of the cases of these methods; with `check`, tell how they differ from what is stored."""
    info, old = driver.info(), store.states()
    found: dict = {"cases": {}, "left_out": {}}
    for case in store.all_cases():
        method = methods()[case.pack.data["method"]]
        if not states.worth_recording(case, method):
            continue
        if method.name in names and not (only_new and case.id in {**old["cases"], **old["left_out"]}):
            told = record_case(driver, case, method)
            found["left_out" if isinstance(told, str) else "cases"][case.id] = told
        else:
            for part, kept in found.items():
                kept |= {k: v for k, v in old[part].items() if k == case.id}
    if check:
        return [f"states.json: {k} is not as recorded" for k in {**found["cases"], **old["cases"]}
                if found["cases"].get(k) != old["cases"].get(k)]
    parts = [f'"{part}": {{\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items()) + "\n}"
             for part, kept in found.items()]
    head = f'"library": {json.dumps(info["name"])}, "version": {json.dumps(info["version"])}'
    (folder / "states.json").write_text("{" + ",\n".join([head, *parts]) + "}\n")
    store.states.cache_clear()
    return []
