"""A driver for a program of any language that speaks JSON lines.

One request, one reply, each on one line:

    -> {"op": "build", "args": {"base": {...}, "weights": {"tensors": "/tmp/x.safetensors"}, "config": {...}, ...}}
    <- {"ok": null}
    -> {"op": "forward", "args": {"inputs": {"tensors": "/tmp/y.safetensors"}}}
    <- {"ok": {"array": "/tmp/z.safetensors"}}

Operations and arguments are those of `conformance.driver.Driver`. A dict of tensors travels as {"tensors": path}, one
array as {"array": path} with the single key "array"; both are safetensors files. Other replies: {"unsupported": why},
{"rejected": why} for input refused on purpose, {"error": what} for a crash. A reader deletes the file it was given.

The program writes its files into the exchange folder, which the environment names as TMPDIR (so that most languages'
temporary files lie there). The suite trusts nothing that a program says: it reads and deletes regular files of that
folder alone, and a program that hangs, dies or talks nonsense is ended, reported and started anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..driver import OPERATIONS, START, Driver, Hung, Rejected, Unsupported

LONGEST_LINE = 2**24  # bytes
LARGEST_FILE = 2**30  # bytes
STARTS = 3  # so often a program may end before it answered anything


class Crashed(Exception):
    """The program died, broke the protocol, or said that it crashed."""


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


def unpack(value, check=lambda path: None):
    """The inverse of `pack`, at any depth; `check(path)` may refuse to open a file."""
    from safetensors.numpy import load_file

    if isinstance(value, dict):
        if set(value) in ({"array"}, {"tensors"}) and isinstance(next(iter(value.values())), str):
            path = next(iter(value.values()))
            check(path)
            found = load_file(path)
            Path(path).unlink(missing_ok=True)
            return found["array"] if "array" in value else found
        return {k: unpack(v, check) for k, v in value.items()}
    return value


class Process(Driver):
    """Starts the program on the first operation, and anew after it died."""

    def __init__(self, command: list[str], seconds: float = START):
        self.command, self.seconds = command, seconds
        self.until: float | None = None  # when the check that is running has to be over
        self.program: Any = None
        self.exchange, self.own = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()
        self.log = Path(self.own.name, "stderr")
        self.unread = b""
        self.number = self.silent = 0  # requests so far; starts of the program since its last answer

    @contextlib.contextmanager
    def _within(self, seconds: float):
        self.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self.until = None

    def start(self):
        if self.silent >= STARTS:
            raise Crashed(f"not started again: {STARTS} times it ended without any answer. {self.last_words()}")
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.silent += 1
        with open(self.log, "wb") as log:
            self.program = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                start_new_session=True, env={**os.environ, "PYTHONPATH": path, "TMPDIR": self.exchange.name})
        for pipe in (self.program.stdin, self.program.stdout):
            os.set_blocking(pipe.fileno(), False)

    def stop(self):
        if self.program is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.program.pid, signal.SIGKILL)  # what it has started goes with it
            self.program.kill()
            self.program.wait()
            self.program.stdin.close()
            self.program.stdout.close()
            self.program, self.unread = None, b""

    def last_words(self) -> str:
        """The end of what the program wrote to stderr."""
        written = self.log.read_bytes()[-1500:].decode(errors="replace").strip() if self.log.exists() else ""
        return f"Its stderr ends: {written}" if written else ""

    def call(self, op: str, *arguments, **named):
        names = Driver.__dict__[op].__code__.co_varnames[1:]
        given = {**dict(zip(names, arguments)), **named}
        self.number += 1
        return self.ask(op, {k: pack(v, Path(self.exchange.name, f"{self.number}-{k}.safetensors"))
                             for k, v in given.items()})

    def ask(self, op: str, args: dict):
        try:
            if self.program is None:
                self.start()
            answer = self.answer(json.dumps({"op": op, "args": args}).encode() + b"\n")
            if "ok" in answer:
                return unpack(answer["ok"], self.check_file)
        except BaseException:
            self.stop()
            raise
        for word, kind in (("unsupported", Unsupported), ("rejected", Rejected), ("error", Crashed)):
            if word in answer:
                raise kind(str(answer[word]))
        raise Crashed(f"an answer of no known kind: {str(answer)[:300]}")

    def answer(self, request: bytes) -> dict:
        line = self.converse(request)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            shown = line[:300].decode(errors="replace")
            raise Crashed(f"a line that is no JSON object: {shown!r}. {self.last_words()}")
        self.silent = 0
        return answer

    def converse(self, request: bytes) -> bytes:
        """Write a line and read one, never longer than there is time, and never more than a line may hold."""
        seconds = self.seconds if self.until is None else max(self.until - time.monotonic(), 0.0)
        until, rest = time.monotonic() + seconds, request
        stdin, stdout = self.program.stdin.fileno(), self.program.stdout.fileno()
        with selectors.DefaultSelector() as ready:
            ready.register(stdin, selectors.EVENT_WRITE)
            ready.register(stdout, selectors.EVENT_READ)
            while True:
                line, found, after = self.unread.partition(b"\n")
                if found:
                    self.unread = after
                    return line
                if len(line) > LONGEST_LINE:
                    raise Crashed(f"a line of more than {LONGEST_LINE >> 20} MiB")
                events = ready.select(min(max(until - time.monotonic(), 0.0), 1.0))
                if not events and self.program.poll() is not None:  # and what it has started keeps the pipe open
                    raise Crashed(f"the program {self.ended()}. {self.last_words()}")
                if not events and time.monotonic() >= until:
                    raise Hung(f"no answer within {seconds:.3g} s. {self.last_words()}")
                for key, _ in events:
                    if key.fd == stdin:
                        try:
                            rest = rest[os.write(stdin, rest[:2**16]):]
                        except BrokenPipeError:
                            rest = b""  # it ended, or does not listen: what it says tells
                        if not rest:
                            ready.unregister(stdin)
                    elif chunk := os.read(stdout, 2**16):
                        self.unread += chunk
                    else:
                        raise Crashed(f"the program {self.ended()}. {self.last_words()}")

    def ended(self) -> str:
        try:
            status = self.program.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its stdout"
        return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"

    def check_file(self, path: str) -> None:
        """Raise `Crashed` unless a file that the program names is a regular one of the exchange folder."""
        try:
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.exchange.name))
            found = os.lstat(path)
        except (OSError, ValueError) as error:
            raise Crashed(f"its answer names a file that cannot be read: {error}") from error
        if not inside:
            raise Crashed(f"its answer names {path!r}, which is not in the folder that TMPDIR names")
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_FILE:
            raise Crashed(f"its answer names {path!r}, which is no regular file of at most {LARGEST_FILE >> 30} GiB")

    def close(self):
        self.stop()
        for folder in (self.exchange, self.own):
            folder.cleanup()


class WholeChecks(Process):
    """A process of `conformance.serve`, where a check of a profile can run as a whole: that spares the files of each
    operation."""

    def __init__(self, command: list[str], profile: str, seconds: float = START):
        super().__init__(command, seconds)
        self.profile = profile

    def _passes(self, task):
        told = self.ask("check", {"task": task, "profile": self.profile})
        if not isinstance(told, list) or len(told) != 2 or told[0] != task:  # a process that was forked answers, too
            self.stop()
            raise Crashed(f"an answer to something else than was asked: {str(told)[:200]}")
        return told[1]


def operation(op):
    def call(self, *arguments, **named):
        return self.call(op, *arguments, **named)

    return call


for _op in OPERATIONS:
    if _op != "close":
        setattr(Process, _op, operation(_op))
