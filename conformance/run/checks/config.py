"""What a config holds: its defaults, what is given, what its file holds, and files of other releases.

`fixtures/config.json` has for each method `required`, the fields that a config must give; `defaults`, all that is held
then; `fewer`, further [config, what it holds], where `required` gives more than it must; `others`, for each field
another value, and what changes with it; `changes`, what the configs of recorded cases hold otherwise than given;
`file`, the `adapter_config.json` of one case.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from ...driver import Unsupported
from ...reference import store
from ...reference.compare import Failure
from ...reference.methods import methods
from .goldens import close, start

MODEL = "base_model_name_or_path"
OWN = ("peft_version", "auto_mapping", MODEL)  # each library's and model's own
VERSION = re.compile(r"\d+(\.\d+)+.*")


NESTED = {"lora": {"eva_config": {
    "rho": 3.0, "tau": 0.5, "use_label_mask": False, "label_mask_value": -1, "whiten": True,
    "adjust_scaling_factors": False}}}


def plain(value):
    """Order does not count among names, and whole numbers are whole in either type."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return sorted(value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def compare(what: str, got: dict, want: dict, held=()) -> set[str]:
    """Raise `Failure` for a field that holds something else, or is lost though it is `held`; else what is not known."""
    for field, value in want.items():
        if field in OWN or (field not in got and field not in held):
            continue
        if field not in got or plain(got[field]) != plain(value):
            raise Failure(f"{what}: {field}", expected=repr(value), got=repr(got.get(field, "no such field")))
    return want.keys() - got.keys() - {*OWN}


def all_known(missing: set[str]) -> None:
    if missing:
        raise Unsupported(f"no field {', '.join(sorted(missing))}")


def defaults(driver, row):
    """A config that gives what it must and no more."""
    all_known(compare("defaults", driver.full_config(row["required"]), row["defaults"]))
    for given, held in row.get("fewer", ()):
        all_known(compare(f"defaults with {given}", driver.full_config(given), held))


def given(driver, row):
    """What is given is held, field by field, and the other fields keep their defaults; what is read again is equal."""
    missing: set[str] = set()
    for field, value, changes in row["others"]:
        got = driver.full_config({**row["required"], field: value})
        missing |= compare(f"with {field} = {value!r}", got, {**row["defaults"], field: value, **changes}, [field])
    for case in store.all_cases():
        if case.pack.data["method"] == row["method"]:
            want = {**row["defaults"], **case.config, **row["changes"].get(case.id, {})}
            got = driver.full_config(case.config)
            missing |= compare(f"config of {case.id}", got, want, case.config)
            again = driver.full_config({k: v for k, v in got.items() if k not in OWN})
            compare(f"config of {case.id}, read again", again, want, case.config)
    all_known(missing)


def saved(driver, row, path) -> tuple[dict, object]:
    """Save the case's adapter; what its config's file holds, and the model's output."""
    case = store.find(row["case"])
    start(driver, case, "float32")
    output = driver.forward(case.tensors("input"))
    driver.save(path)
    return json.loads(Path(path, "adapter_config.json").read_text()), output


def file(driver, row):
    """Every field of the file, among them the release that wrote it and what the base model is."""
    with tempfile.TemporaryDirectory() as path:
        got, _ = saved(driver, row, path)
    missing = compare("adapter_config.json", got, store.resolved(row["file"]), driver.full_config(row["required"]))
    version, mapping = got.get("peft_version"), got.get("auto_mapping")
    if row["file"].get("peft_version") and not (isinstance(version, str) and VERSION.fullmatch(version)):
        raise Failure("adapter_config.json: peft_version", expected="a version, such as '0.21.2'", got=repr(version))
    wanted = row["file"].get("auto_mapping")
    if (sorted(mapping) if isinstance(mapping, dict) else mapping) != (sorted(wanted) if wanted else None):
        raise Failure("adapter_config.json: auto_mapping, for a task type of " + repr(row["file"]["task_type"]),
                      expected="the base model's class and its module" if wanted else "none", got=repr(mapping))
    all_known(missing)


def read(driver, row, change, what):
    """A file that was changed is read as the same config."""
    case = store.find(row["case"])
    with tempfile.TemporaryDirectory() as path:
        held, output = saved(driver, row, path)
        Path(path, "adapter_config.json").write_text(json.dumps(change(held)))
        driver.restore(path, case.base, case.tensors("base"), "float32")
    close(f"output after reading {what}", driver.forward(case.tensors("input")), output, "float32")


def unknown_field(driver, row):
    """A later release's field is passed over."""
    read(driver, row, lambda held: {**held, "a_field_of_a_later_release": {"and": ["its", 1, "value"]}},
         "a file with a field of a later release")


def sparse_file(driver, row):
    """An earlier release's file lacks fields, which have their defaults."""
    given = store.find(row["case"]).config
    read(driver, row, lambda held: {k: v for k, v in held.items() if k in given}, "a file without any default")


def beside(driver, row):
    """A file is read with every field that it holds, those of fields that hold fields included; it overrules what is
    given beside it."""
    full = driver.full_config(row["required"])
    nested = {k: v for k, v in NESTED.get(row["method"], {}).items() if k in full}
    with tempfile.TemporaryDirectory() as path:
        Path(path, "adapter_config.json").write_text(json.dumps({**full, **nested, MODEL: "the file's"}))
        for given in ({}, {MODEL: "given"}):
            got = driver.read_config(path, given)
            compare(f"read with {given} given", got, {**full, **nested})
            if got.get(MODEL) != "the file's":
                raise Failure(f"read with {given} given: {MODEL}", expected="the file's", got=repr(got.get(MODEL)))


def inference(driver, row):
    """The file says that the adapter is for inference. The model that wrote it can be trained on; one that reads it is
    not trainable, prompts excepted.
    """
    case = store.find(row["case"])
    with tempfile.TemporaryDirectory() as path:
        start(driver, case, "float32")
        before = driver.names()
        driver.save(path)
        if driver.names() != before:
            raise Failure("saving changed which parameters are trainable", expected=str(before))
        if not json.loads(Path(path, "adapter_config.json").read_text()).get("inference_mode"):
            raise Failure("adapter_config.json: inference_mode", expected="True", got="False")
        driver.restore(path, case.base, case.tensors("base"), "float32")
    trained = sorted(k for k, on in driver.names().items() if on)
    if trained and not methods()[row["method"]].prompt:
        raise Failure("a loaded adapter is trainable without being asked for it", expected="[]", got=str(trained))


CHECKS = {"defaults": defaults, "given": given, "file": file, "unknown-field": unknown_field,
          "sparse-file": sparse_file, "inference": inference, "beside": beside}
