"""What each method's config holds, from the reference."""

from __future__ import annotations

import json
import tempfile
from typing import Any

from ..driver import Rejected, Unsupported
from ..reference import store
from ..reference.methods import methods
from ..run.checks.config import OWN, plain, saved

NOT_ASKED = {"peft_type", "task_type", *OWN}
MORE = {"oft": {"oft_block_size": 32}}  # without it, a file is of an early release and means something else
CORE = {"lora", "ia3", "vera", "oft", "prompt_tuning"}


def another(value: Any) -> Any:
    """Another value of the same type; None where there is no telling."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return (value + 1 if value >= 0 else 8) if isinstance(value, int) else value / 2 or 0.25
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return [*value, "more"]
    return None


def changed(got: dict, want: dict) -> dict:
    return {k: v for k, v in got.items() if k not in OWN and (k not in want or plain(v) != plain(want[k]))}


def row_of(driver, method) -> dict:
    case = store.packs()[method.name].cases[0]
    minimal: dict[str, Any] = {"peft_type": method.peft_type, **MORE.get(method.name, {})}
    for field in (None, *case.config):  # as few fields as it takes
        if field is not None:
            minimal[field] = case.data["config"][field]
        try:
            defaults = driver.full_config(store.resolved(minimal))
            break
        except Rejected:
            continue
    defaults |= {k: None for k in OWN if k in defaults}
    row: dict[str, Any] = {"method": method.name, "profile": "core" if method.name in CORE else "full",
                           "required": minimal, "defaults": defaults, "others": [], "changes": {}, "case": case.id}
    fewer = dict(minimal)
    for field in minimal:
        less = {k: v for k, v in fewer.items() if k != field}
        try:
            driver.full_config(store.resolved(less))
        except (Rejected, Unsupported, KeyError, TypeError):
            continue
        if field not in (*NOT_ASKED, *MORE.get(method.name, {})):
            fewer = less
    if fewer != minimal:
        held = driver.full_config(store.resolved(fewer))
        row["fewer"] = [[fewer, held | {k: None for k in OWN if k in held}]]
    main = method.name == method.peft_type.lower()  # variants have the same fields
    for field, value in defaults.items() if main else ():
        if field in NOT_ASKED or field in minimal or (other := another(value)) is None:
            continue
        try:
            got = driver.full_config({**minimal, field: other})
            row["others"].append([field, other, changed(got, {**defaults, field: other})])
        except (Rejected, Unsupported):
            pass  # it does not stand alone
    for each in store.packs()[method.name].cases:
        if found := changed(driver.full_config(each.config), {**defaults, **each.config}):
            row["changes"][each.id] = found
    with tempfile.TemporaryDirectory() as path:
        row["file"] = saved(driver, row, path)[0]
    return row


def ordered(value):
    """Names in a fixed order, at any depth: peft keeps some of them in sets."""
    if isinstance(value, dict):
        return {k: ordered(v) for k, v in value.items()}
    if isinstance(value, list):
        return sorted(value) if all(isinstance(v, str) for v in value) else [ordered(v) for v in value]
    return value


def record(driver) -> list[dict]:
    rows = json.dumps([ordered(row_of(driver, method)) for method in methods().values()])
    return json.loads(rows.replace(f"{store.folder()}/", ""))  # files that configs name
