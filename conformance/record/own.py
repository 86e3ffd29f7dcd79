"""Laws and formula of a method that no reference knows: `python -m conformance laws --method PACKAGE.MODULE:NAME`."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from ..drivers import open_driver
from ..drivers.oracle import Oracle
from ..reference import store
from ..reference.method import KEY, Method
from ..reference.methods import methods
from ..run import plan, runner
from ..run.reporting import terminal
from . import recorder


class Formula(Oracle):
    """The formula as an implementation whose parameters have the names that PEFT's rule gives them.

    What a layer trains stands below the layer, in the slot that its saved key names, under the adapter's name.
    """

    def _live(self) -> dict[str, tuple[int, ...]]:
        found, targets = {}, set()
        for key, tensor in self.state_dict().items():
            path = max((p for p in self.paths() if key.startswith(f"{KEY}{p}.")), key=len)
            slot, dot, rest = key.removeprefix(f"{KEY}{path}.").partition(".")
            if not self.method.tensors.is_frozen(key):
                found[f"{KEY}{path}.{slot}.default{dot}{rest}"] = tensor.shape
            targets.add(path)
        for name, tensor in self.base_weights.items():
            path, _, leaf = name.rpartition(".")
            found[f"{KEY}{path}.base_layer.{leaf}" if path in targets else KEY + name] = tensor.shape
        return found

    def paths(self) -> list[str]:
        """Paths of the base model's layers."""
        return [name.rpartition(".")[0] for name in self.base_weights]

    def names(self) -> dict[str, bool]:
        return {name: ".default" in name for name in self._live()}

    def count(self) -> tuple[int, int]:
        sizes = {name: math.prod(shape) for name, shape in self._live().items()}
        return sum(size for name, size in sizes.items() if ".default" in name), sum(sizes.values())


def load(where: str) -> Method:
    """The method at `package.module:NAME`, from now on one of the suite's. Raises `LookupError` when it is none."""
    module, _, name = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), name or "METHOD")
    except (ImportError, AttributeError) as error:
        raise LookupError(f"{where!r} is no method: {error}. Give it as package.module:NAME.") from error
    if not isinstance(found, Method):
        raise LookupError(f"{where!r} is a {type(found).__name__}, no conformance.reference.method.Method.")
    if methods().setdefault(found.name, found) is not found:
        raise LookupError(f"The suite has a method {found.name!r} already: name yours otherwise.")
    return found


def record(method: Method, folder: Path) -> list[str]:
    """Write the method's goldens, out of its formula, below a folder. Returns what is wrong with its rows, in words."""
    narrow = lambda row: tuple(dtype for dtype in row.dtypes if dtype != "float64")  # gradients are finite differences
    rows = [replace(row, golden="formula", dtypes=narrow(row)) for row in method.rows]
    return recorder.record_method(replace(method, rows=rows), Formula(), folder)


def do_record(args: list[str]) -> int:
    """Write the goldens of a method into a folder: `record --formula MODULE:NAME FOLDER`."""
    options = argparse.ArgumentParser("python -m conformance record --formula", description=do_record.__doc__)
    options.add_argument("method", metavar="MODULE:NAME", help="where the method is described")
    options.add_argument("folder", type=Path, help="its pack is written to FOLDER/methods/")
    given = options.parse_args(args)
    try:
        method = load(given.method)
    except LookupError as error:
        options.error(str(error))
    wrong = record(method, given.folder)
    print("\n".join(wrong) if wrong else f"{method.name}: {len(method.rows)} cases in {given.folder / 'methods'}")
    return 1 if wrong else 0


def main(args: list[str]) -> int:
    """Check an implementation of one method by its laws, and by goldens that its formula gives."""
    options = argparse.ArgumentParser("python -m conformance laws", description=main.__doc__)
    options.add_argument("--method", required=True, metavar="MODULE:NAME", help="where the method is described")
    options.add_argument("--impl", default="minipeft", help="as for `python -m conformance`; runs in this process")
    options.add_argument("--profile", choices=plan.PROFILES, default="full")
    options.add_argument("--timeout", type=float, default=30.0, help="seconds for one check")
    given = options.parse_args(args)
    begun = time.perf_counter()
    try:
        method = load(given.method)
    except LookupError as error:
        options.error(str(error))
    driver = open_driver(given.impl)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if wrong := record(method, Path(folder)):
                print("The rows of the method are wrong:\n" + "\n".join(wrong), file=sys.stderr)
                return 1
            pack = store.Pack(Path(folder, "methods", f"{method.name}.json"))
            cases = [store.Case(data, pack) for data in pack.data["cases"]]
            tasks = [*plan.golden_tasks(cases, given.profile, plan.DTYPES), *plan.lifecycle_tasks(cases),
                     *plan.law_tasks(given.profile, [method.name])]
            results = runner.run(driver, tasks, [], given.timeout, terminal.Progress(len(tasks)))
    finally:
        driver.close()
    good, counts = runner.verdict(results)
    terminal.print_table(results, terminal.console())
    if bad := terminal.failures(results, 40):
        print("\n" + bad)
    told = ", ".join(f"{n} {k}" for k, n in counts.most_common())
    print(f"\n{told} in {time.perf_counter() - begun:.1f} s: {'PASSED' if good else 'FAILED'}")
    return 0 if good else 1
