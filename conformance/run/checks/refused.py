"""Configs with a field that is out of range, or not for such a layer, are refused. `fixtures/refused.json`, from the
reference, has for a case of each method on each kind of layer the fields and values."""

from __future__ import annotations

from ...driver import Unsupported
from ...reference import store
from .reject import refuse


def check(driver, row):
    case, missing = store.find(row["case"]), []
    for field, value in row["refused"]:
        config = {**case.config, field: value}
        try:
            refuse(f"{field} = {value!r} in the config of {case.id}",
                   lambda config=config: driver.build(case.base, case.tensors("base"), config, "float32", case=case.id))
        except Unsupported:  # a field that a release has not
            missing.append(field)
    if len(missing) == len(row["refused"]):
        raise Unsupported(f"no field {', '.join(sorted({*missing}))}")
