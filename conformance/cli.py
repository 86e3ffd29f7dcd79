"""The command line: `python -m conformance --impl NAME ...`."""

from __future__ import annotations

import argparse
import sys
import time

from . import plan, runner
from .drivers import open_driver
from .reporting import files, html, terminal


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m conformance", description="Check a PEFT implementation.",
                                epilog="Other commands: record [--check] [METHOD ...], freeze, power, coverage, "
                                       "disputed.")
    p.add_argument("--impl", default="minipeft", help="peft, minipeft or any module with PEFT's API; loralib, lycoris; "
                   "'cmd:PROGRAM' for a program that speaks JSON lines; 'module:Class' for a driver of your own")
    p.add_argument("--python", help="run the implementation in this interpreter, out of process")
    p.add_argument("--profile", choices=plan.PROFILES, default="full")
    p.add_argument("--methods", help="comma-separated, e.g. lora,ia3")
    p.add_argument("--cases", help="only case ids that contain this text")
    p.add_argument("--checks", help="comma-separated, e.g. forward,merge")
    p.add_argument("--html", help="write the report as one static page")
    p.add_argument("--json", help="write one JSON line for each result")
    p.add_argument("--junit", help="write JUnit XML")
    p.add_argument("--badge", help="write an SVG badge")
    p.add_argument("--timeout", type=float, default=30.0, help="seconds for one check")
    p.add_argument("--no-known-issues", action="store_true", help="report listed known issues as failures")
    p.add_argument("--most", type=int, default=40, help="how many failures to print")
    return p


def main(argv=None) -> int:
    a = parser().parse_args(argv)
    begun = time.perf_counter()
    driver = open_driver(a.impl, a.python)
    info = driver.info()
    methods = a.methods.split(",") if a.methods else None
    tasks = plan.tasks(a.profile, methods, a.cases, info["dtypes"])
    if a.checks:
        tasks = [t for t in tasks if t.check in a.checks.split(",")]
    issues = [] if a.no_known_issues else runner.known_issues(info["name"], info["version"])
    progress = terminal.Progress(len(tasks))
    results = runner.run(driver, tasks, issues, a.timeout, progress)
    progress.close()
    driver.close()
    good, counts = runner.verdict(results)
    seconds = time.perf_counter() - begun
    if a.html:
        html.write(a.html, info, a.profile, results, good, seconds)
    if a.json:
        files.jsonl(a.json, info, a.profile, results)
    if a.junit:
        files.junit(a.junit, info, results)
    if a.badge:
        files.badge(a.badge, info, good, counts)
    print(f"{info['name']} {info['version']}, profile {a.profile}\n")
    terminal.print_table(results, terminal.console())
    if bad := terminal.failures(results, a.most):
        print("\n" + bad)
    print("\n" + ", ".join(f"{n} {k}" for k, n in counts.most_common()) +
          f" in {seconds:.1f} s: " + ("PASSED" if good else "FAILED"))
    if not results:
        print("No case was run, which counts as a failure.", file=sys.stderr)
    return 0 if good else 1
