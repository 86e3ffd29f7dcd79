"""Run the measurements on minipeft and on peft in turn, a fresh process each, and print minipeft's as ratios to peft's."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

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
    done = subprocess.run(command, capture_output=True, text=True)
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


def spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.3g} [dim]{min(values):.3g}..{max(values):.3g}[/]{unit}"


def row(quantity: str, values: dict[str, list[float]], ours: str) -> list[str]:
    *what, unit = quantity.split()
    scale, unit = (1e3, " ms") if unit == "seconds" else (1, " MiB")
    cells = [spread([scale * v for v in values[library]], unit) for library in values]
    ratios = {k: [a / b for a, b in zip(values[ours], values[k])] for k in values if k != ours}
    return [" ".join(what), *cells[:2], *(spread(r) for r in ratios.values())]


def machine(options: argparse.Namespace) -> dict:
    import torch

    packages = {"torch", "safetensors", "peft", "transformers", options.library}
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in sorted(packages & installed.keys())},
        "rounds": options.rounds,
    }


def main() -> int:
    options, console, failures = arguments(), Console(), []
    ours = options.library
    table = Table("measurement", ours, "peft", "ratio", "ratio to torch", title=f"{ours} against peft, on {options.device}")
    results = {}
    for name in track(options.only, "measuring", console=Console(stderr=True)):
        try:
            measured = rounds(name, [ours, "peft", *(["torch"] if name == "imports" else [])], options)
        except RuntimeError as error:
            failures.append(str(error))
            continue
        for quantity, values in measured.items():
            results[quantity] = values
            table.add_row(*row(quantity, values, ours))
    console.print(table)
    console.print("median min..max over rounds; a ratio is taken round by round: under 1, less than peft takes")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine(options), "results": results, "failures": failures}, indent=1))
    for failure in failures:
        console.print(f"[red]failed[/] {failure}", highlight=False)
    return bool(failures)


sys.exit(main())
