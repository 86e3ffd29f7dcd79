"""Measure minipeft and peft in turn, in a fresh process each, and print minipeft's figures as ratios to peft's."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .measure import MEASUREMENTS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="NAME",
                        help="these measurements alone: " + ", ".join(MEASUREMENTS))
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each library and measurement")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--library", default=os.environ.get("MINIPEFT_UNDER_TEST", "minipeft"),
                        help="the module to compare with peft")
    parser.add_argument("--json", type=Path, default=Path("report/benchmarks.json"), help="where the numbers are kept")
    return parser.parse_args()


def measure(name: str, library: str, device: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.measure", name, library, device]
    # glibc: freed memory goes back at once where memory is measured, and never where time is: when it goes back depends
    # on what a process freed before, and fetching it again can cost more than what is measured
    kept = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536"} if name == "memory" else kept if name != "imports" else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | returned)
    if done.returncode:
        raise RuntimeError(f"{name} on {library}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def rounds(name: str, libraries: list[str], options: argparse.Namespace) -> dict:
    """{quantity: {library: [one value a round]}}; the libraries take turns, so that a busy spell hits them all."""
    values: dict = {}
    for turn in range(-1 if name == "imports" else 0, options.rounds):
        for library in libraries:
            measured = measure(name, library, options.device)
            for quantity, value in measured.items() if turn >= 0 else ():  # the first import fills the file cache
                values.setdefault(quantity, {}).setdefault(library, []).append(value)
    return values


def spread(values: list[float]) -> str:
    middle, least, most = (
        f"{v:.3g}" if abs(v) < 1000 else f"{v:.0f}" for v in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} [dim]({least} to {most})[/]"


def rows(quantity: str, values: dict[str, list[float]], ours: str):
    """One row for each library that ours is compared with."""
    what, unit = quantity.rsplit(" ", 1)
    scale, unit = (1e3, "ms") if unit == "seconds" else (1, unit)
    for other in values.keys() - {ours}:
        ratio = [a / b for a, b in zip(values[ours], values[other])]
        mine, theirs = (spread([scale * v for v in values[library]]) for library in (ours, other))
        yield what, unit, mine, other, theirs, spread(ratio)


def machine(options: argparse.Namespace) -> dict:
    import torch

    packages = {"torch", "safetensors", "peft", "transformers", options.library}
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in sorted(packages & installed.keys())},
        "rounds": options.rounds,
    }


def main() -> int:
    options, failures = arguments(), []
    console = Console(width=None if sys.stdout.isatty() else 120)
    ours = options.library
    table = Table("measurement", "unit", ours, "against", "", "ratio", box=SIMPLE)
    results = {}
    for name in track(options.only, "measuring", console=Console(stderr=True)):
        try:
            measured = rounds(name, [ours, "peft", *(["torch"] if name == "imports" else [])], options)
        except RuntimeError as error:
            failures.append(str(error))
            continue
        for quantity, values in measured.items():
            results[quantity] = values
            for row in rows(quantity, values, ours):
                table.add_row(*row)
    console.print(table)
    console.print("median (least to most) of the rounds; ratio, round by round: under 1, less than the other takes")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(options), "results": results, "failures": failures}
    options.json.write_text(json.dumps(report, indent=1))
    for failure in failures:
        console.print(f"[red]failed[/] {failure}", highlight=False)
    return bool(failures)


sys.exit(main())
