"""Measure minipeft beside peft and print minipeft's figures as ratios to peft's."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .measure import APART, MEASUREMENTS
from .methods import METHODS
from .page import page

WORSE = 1.15  # how many times the recorded ratio is too much


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="NAME",
                        help="these measurements alone: " + ", ".join(MEASUREMENTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
                        help="these methods alone: " + ", ".join(METHODS))
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, help="features of the linear layers (1024; with cuda 4096, in bfloat16)")
    parser.add_argument("--adapters", type=int, default=200, help="how many are loaded onto one model")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--library", default=os.environ.get("MINIPEFT_UNDER_TEST", "minipeft"),
                        help="the module to compare with peft")
    parser.add_argument("--json", type=Path, default=Path("report/benchmarks.json"),
                        help="where the numbers are kept; the page is beside it")
    parser.add_argument("--against", type=Path, metavar="JSON",
                        help="numbers of an earlier run: fail where a ratio is more than 15%% above the one there")
    options = parser.parse_args(given)
    options.width = options.width or {"cpu": 1024, "cuda": 4096}[options.device]
    return options


def measure(name: str, libraries: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{quantity: {"unit": ..., "values": {library: [one value a round]}}}, from a fresh process; {} of what failed."""
    run = {"name": name, "libraries": libraries, "tokens": {"cpu": 256, "cuda": 4096}[options.device]}
    for option in ("device", "width", "rounds", "adapters", "methods", "backend"):
        run[option] = getattr(options, option)
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(run)]
    # glibc: freed memory stays with the process. When it goes back depends on what was freed before, and fetching it
    # again can cost more than what is measured
    kept = {} if name in APART else {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | kept)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"quantity"')]
    for row in rows:
        if not row["values"]:
            row["failed"] = f"{row['quantity']}: {row['unit']}"
    return {row.pop("quantity"): row for row in rows}


def measured(name: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The same of all libraries: in one process, or where that will not do in one each, in turn."""
    if name not in APART:
        return measure(name, [options.library, "peft"], options)
    found: dict[str, dict[str, Any]] = {}
    for turn in range(-1, options.rounds):
        for library in (options.library, "peft"):
            for quantity, row in measure(name, [library], options).items() if turn >= 0 else ():
                values = found.setdefault(quantity, {"unit": row["unit"], "values": {}})["values"]
                values.setdefault(library, []).extend(row["values"][library])
            if turn < 0:
                measure(name, [library], options)  # the first import fills the file cache
    return found


def summary(row: dict[str, Any], ours: str, theirs: str = "peft") -> dict[str, Any]:
    """With the medians, and over the rounds the ratio of ours to theirs."""
    values = row["values"]
    row["median"] = {library: statistics.median(taken) for library, taken in values.items()}
    ratios = [a / b for a, b in zip(values.get(ours, ()), values.get(theirs, ())) if b]
    if ratios:
        row["ratio"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return row


def worse(results: dict[str, Any], recorded: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """{quantity: (ratio then, ratio now)} of the ratios that got worse by more than 15%."""
    both = [name for name in results if "ratio" in results[name] and "ratio" in recorded.get(name, ())]
    pairs = {name: (recorded[name]["ratio"]["median"], results[name]["ratio"]["median"]) for name in both}
    return {name: (then, now) for name, (then, now) in pairs.items() if now > WORSE * then}


def machine(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    packages = {"torch", "safetensors", "peft", "transformers", options.library}
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "libraries": [options.library, "peft"],
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in sorted(packages & installed.keys())},
        "rounds": options.rounds,
        "width": options.width,
    }


def shown(value: float, unit: str) -> str:
    value, unit = (1e3 * value, "ms") if unit == "seconds" else (value, unit)
    return f"{value:.3g} {unit}"


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    failures: list[str] = []
    results: dict[str, dict[str, Any]] = {}
    console, ours = Console(width=None if sys.stdout.isatty() else 120), options.library
    recorded = json.loads(options.against.read_text())["results"] if options.against else {}
    for name in track(options.only, "measuring", console=Console(stderr=True)):
        try:
            rows = measured(name, options)
            failures += [row["failed"] for row in rows.values() if "failed" in row]
            found = {quantity: summary(row, ours) for quantity, row in rows.items() if row["values"]}
            if worse(found, recorded):  # once more, before it is believed
                doubted, again = worse(found, recorded), measured(name, options)
                found |= {quantity: summary(again[quantity], ours) for quantity in doubted if quantity in again}
            results |= found
        except RuntimeError as error:
            failures.append(str(error))
    table = Table("", ours, "peft", "ratio", "least", "most", box=SIMPLE)
    for quantity, row in results.items():
        medians = [shown(row["median"][n], row["unit"]) if n in row["median"] else "" for n in (ours, "peft")]
        table.add_row(quantity, *medians, *(f"{value:.2f}" for value in row.get("ratio", {}).values()))
    console.print(table)
    console.print("medians of the rounds; the ratio is taken round by round: under 1, less than peft takes")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(options), "results": results, "failures": failures}
    options.json.write_text(json.dumps(report, indent=1))
    options.json.with_suffix(".html").write_text(page(report))
    for failure in failures:
        console.print(f"[red]failed[/] {failure}", highlight=False)
    for quantity, (then, now) in worse(results, recorded).items():
        console.print(f"[red]worse[/] {quantity}: {now:.2f}, recorded {then:.2f}", highlight=False)
    return bool(failures or worse(results, recorded))


if __name__ == "__main__":
    sys.exit(main())
