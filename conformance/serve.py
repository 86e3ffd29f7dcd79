"""Any in-process driver as a program: JSON lines on stdin and stdout, tensors by safetensors path.

`python -m conformance.serve peft` speaks the protocol that `drivers/process.py` describes. It knows one request more:
{"op": "check", "args": {"task": id, "profile": "full"}} runs a whole check of the suite here, and tells in
{"ok": [id, what]} what is wrong, or "".
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

from .driver import OPERATIONS, Driver, Rejected, Unsupported
from .drivers import open_driver
from .drivers.process import pack, unpack


class AsIfApart(Driver):
    """A driver that shares nothing with its caller: all that passes is as the protocol would carry it."""

    def __init__(self, driver: Driver):
        self.driver = driver

    def _within(self, seconds):
        return contextlib.nullcontext()  # the other side looks at the clock


def carried(value):
    """A value as it arrives at the other side of the protocol."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise TypeError(f"an array of {value.dtype}, which no file of safetensors holds")
        return np.array(value)
    if isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
        return {k: carried(v) for k, v in value.items()}
    return json.loads(json.dumps(value))


def operation(op):
    def call(self, *arguments, **named):
        return carried(getattr(self.driver, op)(*map(carried, arguments), **{k: carried(v) for k, v in named.items()}))

    return call


for _op in OPERATIONS:
    setattr(AsIfApart, _op, operation(_op))


@functools.cache
def checks(profile: str) -> dict:
    from .run import plan

    return {task.id: task for task in plan.tasks(profile)}


def check(driver: Driver, task: str, profile: str) -> str:
    """What is wrong with the check of this id, or ""; raises `Unsupported` where the driver does not claim it."""
    from .run import runner

    result = runner.run_one(AsIfApart(driver), checks(profile)[task])
    if result.outcome == "unsupported":
        raise Unsupported(result.message)
    return "" if result.outcome == "pass" else f"{result.outcome}: {result.message}"


def answer(driver, request: dict, folder: Path, number: int) -> dict:
    """Do one operation; what it raised is told in one word and a message."""
    try:
        if request["op"] == "check":
            return {"ok": [request["args"]["task"], check(driver, **request["args"])]}
        if request["op"] not in OPERATIONS:
            raise Unsupported(f"no operation {request['op']!r}")
        arguments = unpack(request.get("args", {}))
        result = getattr(driver, request["op"])(**arguments)
        return {"ok": pack(result, folder / f"answer-{number}.safetensors")}
    except Unsupported as e:
        return {"unsupported": str(e)}
    except Rejected as e:
        return {"rejected": str(e)}
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        return {"error": f"{type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"}


def main(name: str) -> None:
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the lines
    with tempfile.TemporaryDirectory() as folder:
        driver = open_driver(name)
        for number, line in enumerate(sys.stdin):
            reply = answer(driver, json.loads(line), Path(folder), number)
            try:
                text = json.dumps(reply)
            except (TypeError, ValueError) as e:
                text = json.dumps({"error": f"an answer that JSON cannot hold: {e}"})
            lines.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
