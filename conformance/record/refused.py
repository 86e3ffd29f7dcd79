"""Configs that the reference refuses: those of recorded cases with one field out of range, or none for such a layer."""

from __future__ import annotations

from typing import Any

from ..driver import Rejected
from ..reference import store
from ..reference.methods import methods
from ..run.checks.config import OWN

NOT_ASKED = {"peft_type", "task_type", "revision", "inference_mode", "target_modules", "target_parameters",
             "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern", "tokenizer_name_or_path",
             "tokenizer_kwargs", *OWN}


def others(value) -> list:
    """Values that such a field may not take."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [0, -1, 7, value + 1] if isinstance(value, int) else [-0.5, 1.5, 2]
    return ["nonsense"] if isinstance(value, str) else [-1, "nonsense", 1] if value is None else []


def refuses(driver, case, config, beside=None) -> bool:
    """On purpose: by a ValueError, which PEFT raises where it looks at a config. `beside`: another adapter's, which is
    there already."""
    try:
        driver.build(case.base, case.tensors("base"), beside or config, "float32", case=case.id)
        if beside:
            driver.add("other", config)
    except Exception as e:  # it may crash, too
        return isinstance(e, Rejected) and str(e).startswith("ValueError")
    return False


def record(driver) -> list[dict]:
    """A row for the first case of each method on each kind of layer."""
    rows: list[dict[str, Any]] = []
    for method in methods().values():
        known, kinds = store.configs()[method.name]["defaults"], set()
        for case in store.packs()[method.name].cases:
            kind = case.id.split("/")[1]
            if kind in kinds:
                continue
            kinds.add(kind)
            found = [[field, other] for field, value in {**known, **case.config}.items() if field not in NOT_ASKED
                     for other in others(value) if other != value
                     and refuses(driver, case, {**case.config, field: other})]
            if found:
                rows.append({"method": method.name, "id": kind, "profile": "full", "case": case.id, "refused": found})
            if len(kinds) > 1 or method.laws.single:
                continue
            second = [[field, other] for field, value in {**known, **case.config, **method.laws.second}.items()
                      if field not in NOT_ASKED for other in others(value)
                      if other != value and [field, other] not in found
                      and refuses(driver, case, {**case.config, **method.laws.second, field: other}, case.config)]
            if second:
                rows.append({"method": method.name, "id": "second", "profile": "full", "case": case.id,
                             "refused": second, "beside": True})
    return rows
