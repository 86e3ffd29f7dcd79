"""Configs with a field that is out of range, or not for such a layer, are refused. `fixtures/refused.json`, from the
reference, has for a case of each method on each kind of layer the fields and values."""

from __future__ import annotations

from functools import partial

from ...driver import Unsupported
from ...reference import store
from ...reference.methods import methods
from .reject import refuse


def check(driver, row):
    case, missing, method = store.find(row["case"]), [], methods()[row["method"]]
    build = partial(driver.build, case.base, case.tensors("base"), dtype="float32", case=case.id)
    for field, value in row["refused"]:
        config = {**case.config, field: value}
        try:
            if not row.get("beside"):
                refuse(f"{field} = {value!r} in the config of {case.id}", partial(build, config=config))
                continue
            build(config=case.config)
            refuse(f"another adapter with {field} = {value!r} beside that of {case.id}",
                   partial(driver.add, "other", {**config, **method.laws.second, field: value}))
        except Unsupported:  # a field that a release has not
            missing.append(field)
    if len(missing) == len(row["refused"]):
        raise Unsupported(f"no field {', '.join(sorted({*missing}))}")
