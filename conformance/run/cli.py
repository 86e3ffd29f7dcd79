"""The command line: `python -m conformance --impl NAME ...`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import signal
import sys
import threading
import time

from ..driver import START
from ..drivers import open_driver
from . import causes, plan, runner
from .reporting import files, html, terminal


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m conformance", description="Check a PEFT implementation.",
                                epilog="Other commands: explain CASE[:CHECK], compare REPORT ..., "
                                       "record [--check] [METHOD ...], freeze, power, coverage, disputed.")
    p.add_argument("--impl", default="minipeft", help="peft, minipeft or any module with PEFT's API; loralib, lycoris; "
                   "'cmd:PROGRAM' for a program that speaks JSON lines; 'module:Class' for a driver of your own")
    p.add_argument("--python", help="run the implementation in this interpreter (default: the suite's own)")
    p.add_argument("--in-process", action="store_true", help="in the suite's own process, for a debugger; there its "
                   "crash ends the suite too")
    p.add_argument("--profile", choices=plan.PROFILES, default="full")
    p.add_argument("--methods", help="comma-separated, e.g. lora,ia3")
    p.add_argument("--cases", help="only the case of this name, or those whose names contain this text")
    p.add_argument("--checks", help="comma-separated, e.g. forward,merge")
    p.add_argument("--html", help="write the report as one static page")
    p.add_argument("--json", help="write one JSON line for each result")
    p.add_argument("--junit", help="write JUnit XML")
    p.add_argument("--badge", help="write an SVG badge")
    p.add_argument("--timeout", type=seconds, default=30.0, metavar="SECONDS", help="for one check, and if it is more "
                   f"than {START:g} for the start of the implementation")
    p.add_argument("--no-known-issues", action="store_true", help="report listed known issues as failures")
    p.add_argument("--most", type=int, default=40, help="how many failures to print")
    return p


def seconds(text: str) -> float:
    """A number of seconds that can be waited."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time to wait: it must be a number above 0")
    return value


@contextlib.contextmanager
def ending_with_children():
    """While it is open, SIGTERM ends the suite as an exception does, so that the implementation's process ends too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def names(given: str | None, known, what: str, error) -> list[str] | None:
    """A comma-separated option as a list; `error` is called for a name that is not among the known ones."""
    if given is None:
        return None
    chosen = [name.strip() for name in given.split(",")]
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            error(f"no {what} is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else
                                                   f"; there are {', '.join(sorted(known))}"))
    return chosen


def described(driver) -> dict:
    """What the driver says of itself. Raises `TypeError` when that is not what the protocol asks for."""
    info = driver.info()
    texts = isinstance(info, dict) and isinstance(info.get("name"), str) and isinstance(info.get("version"), str)
    if not texts or not isinstance(info.get("dtypes"), list) or not set(map(str, info["dtypes"])) <= set(plan.DTYPES):
        raise TypeError(f"`info` must give a name, a version and dtypes out of {', '.join(plan.DTYPES)}, not {info!r}")
    return {key: runner.clean(value, 200) if isinstance(value, str) else value for key, value in info.items()}


def main(argv=None) -> int:
    options = parser()
    a = options.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    begun = time.perf_counter()
    methods = names(a.methods, plan.all_methods(), "method", options.error)
    tasks = plan.tasks(a.profile, methods, a.cases)
    if not tasks:
        known = dict.fromkeys(t.case for t in plan.tasks(a.profile, methods))
        near = difflib.get_close_matches(a.cases, known, 1, 0.3)
        options.error(f"no case's name contains {a.cases!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
    checks = names(a.checks, dict.fromkeys(t.check for t in tasks), "check of these cases", options.error)
    where, whole = None if a.in_process else a.python or sys.executable, None if a.python else a.profile
    try:
        driver = open_driver(a.impl, where, whole, max(a.timeout, START))
    except (ValueError, ImportError, AttributeError) as e:
        options.error(f"--impl {a.impl!r}: {e}")
    with ending_with_children(), contextlib.closing(driver):
        try:
            info = described(driver)
        except Exception as e:
            message = runner.clean(f"could not be started: {type(e).__name__}: {e}")
            info, issues = {"name": runner.clean(a.impl, 200), "version": "?", "dtypes": []}, []
            results = [runner.Result("-", "-", "info", "-", "error", message)]
        else:
            tasks = [t for t in plan.tasks(a.profile, methods, a.cases, info["dtypes"])
                     if not checks or t.check in checks]
            issues = [] if a.no_known_issues else runner.known_issues(info["name"], info["version"])
            progress = terminal.Progress(len(tasks))
            results = runner.run(driver, tasks, issues, a.timeout, progress)
            progress.close()
            causes.name_causes(tasks, results)
    good, counts = runner.verdict(results)
    taken = time.perf_counter() - begun
    print(f"{info['name']} {info['version']}, profile {a.profile}\n")
    terminal.print_table(results, terminal.console())
    if bad := terminal.failures(results, a.most):
        print("\n" + bad)
    print("\n" + ", ".join(f"{n} {k}" for k, n in counts.most_common()) +
          f" in {taken:.1f} s: " + ("PASSED" if good else "FAILED"))
    if not results:
        print("No case was run, which counts as a failure.", file=sys.stderr)
    if a.html:
        html.write(a.html, info, a.profile, results, good, taken)
    if a.json:
        files.jsonl(a.json, info, a.profile, results)
    if a.junit:
        files.junit(a.junit, info, results)
    if a.badge:
        files.badge(a.badge, info, good, counts)
    return 0 if good else 1
