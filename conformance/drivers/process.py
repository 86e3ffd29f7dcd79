"""A driver for a program of any language that speaks JSON lines.

One request, one reply, each on one line:

    -> {"op": "build", "args": {"base": {...}, "weights": {"tensors": "/tmp/x.safetensors"}, "config": {...}, ...}}
    <- {"ok": null}
    -> {"op": "forward", "args": {"inputs": {"tensors": "/tmp/y.safetensors"}}}
    <- {"ok": {"array": "/tmp/z.safetensors"}}

Operations and arguments are those of `conformance.driver.Driver`. A dict of tensors travels as {"tensors": path}, one
array as {"array": path} with the single key "array"; both are safetensors files. Other replies: {"unsupported": why},
{"rejected": why} for input refused on purpose, {"error": what} for a crash. A reader deletes the file it was given.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..driver import OPERATIONS, Driver, Rejected, Unsupported


class Crashed(Exception):
    """The program died, hung, or said that it crashed."""


def pack(value, path: Path):
    """A result or argument as JSON, its arrays in the file `path`."""
    from safetensors.numpy import save_file

    if isinstance(value, np.ndarray):
        save_file({"array": np.ascontiguousarray(value)}, path)
        return {"array": str(path)}
    if isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
        save_file({k: np.ascontiguousarray(v) for k, v in value.items()}, path)
        return {"tensors": str(path)}
    if isinstance(value, tuple):
        return list(value)
    return value


def unpack(value):
    """The inverse of `pack`, at any depth of a request's arguments."""
    from safetensors.numpy import load_file

    if isinstance(value, dict):
        if set(value) in ({"array"}, {"tensors"}) and isinstance(next(iter(value.values())), str):
            path = next(iter(value.values()))
            found = load_file(path)
            Path(path).unlink(missing_ok=True)
            return found["array"] if "array" in value else found
        return {k: unpack(v) for k, v in value.items()}
    return value


class Process(Driver):
    """Starts the program on the first operation, and anew after it died."""

    def __init__(self, command: list[str], seconds: float = 60.0):
        self.command, self.seconds = command, seconds
        self.program: Any = None
        self.folder = tempfile.TemporaryDirectory()
        self.number = 0

    def start(self):
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.program = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, bufsize=1,
                                        env={**os.environ, "PYTHONPATH": path})

    def stop(self):
        if self.program is not None:
            self.program.kill()
            self.program.wait()
            self.program.stdin.close()
            self.program.stdout.close()
            self.program = None

    def call(self, op: str, *arguments, **named):
        if self.program is None:
            self.start()
        names = Driver.__dict__[op].__code__.co_varnames[1:]
        given = {**dict(zip(names, arguments)), **named}
        self.number += 1
        args = {k: pack(v, Path(self.folder.name, f"{self.number}-{k}.safetensors")) for k, v in given.items()}
        try:
            self.program.stdin.write(json.dumps({"op": op, "args": args}) + "\n")
            self.program.stdin.flush()
            line = self.read_line()
        except BaseException:
            self.stop()  # also when the runner's alarm rings: the next operation gets a new program
            raise
        if "ok" in line:
            return unpack(line["ok"])
        for word, kind in (("unsupported", Unsupported), ("rejected", Rejected), ("error", Crashed)):
            if word in line:
                raise kind(line[word])
        raise Crashed(f"an answer of no known kind: {line}")

    def read_line(self) -> dict:
        with selectors.DefaultSelector() as ready:
            ready.register(self.program.stdout, selectors.EVENT_READ)
            if not ready.select(self.seconds):
                raise Crashed(f"no answer within {self.seconds:g} s")
        line = self.program.stdout.readline()
        if not line:
            raise Crashed(f"the program ended with status {self.program.wait()}")
        return json.loads(line)

    def close(self):
        self.stop()
        self.folder.cleanup()


def operation(op):
    def call(self, *arguments, **named):
        return self.call(op, *arguments, **named)

    return call


for _op in OPERATIONS:
    if _op != "close":
        setattr(Process, _op, operation(_op))
