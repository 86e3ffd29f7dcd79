"""`python -m conformance [COMMAND]`: check (the default), explain, compare, record, freeze, power, coverage, ..."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from pathlib import Path

from .drivers import open_driver
from .record import beginnings, config, coverage, disputed, own, recorder, refused, states, targets
from .reference import store
from .reference.methods import methods
from .run import cli, explain, power
from .run.reporting import side_by_side, terminal

TABLES = {"config": config.record, "targets": targets.record, "beginnings": beginnings.record,
          "refused": refused.record}  # which read the first


def parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"python -m conformance {command}", description=description)


def alone(command: str, function):
    """A command that takes no arguments."""
    def run(args: list[str]) -> int:
        parser(command, inspect.getdoc(function) or "").parse_args(args)
        return function()

    return run


def do_record(args: list[str]) -> int:
    """Record packs and tables anew, or only cases that are not there yet, or check that it gives the same.

    `--formula MODULE:NAME FOLDER`: those of a method that no reference knows, out of its formula, into another folder.
    """
    options = parser("record", "Record golden data from the reference, over what is there.")
    options.add_argument("names", nargs="*", metavar="NAME", help=f"methods, or {', '.join(TABLES)}; without: all")
    how = options.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="write nothing; is what is there the same?")
    how.add_argument("--new", action="store_true", help="only cases and rows that are not there yet")
    how.add_argument("--formula", nargs=2, metavar=("MODULE:NAME", "FOLDER"),
                     help="those of a method that no reference knows, out of its formula")
    asked = options.parse_args(args)
    if asked.formula:
        if asked.names:
            options.error("with --formula there is one method, and it is given there")
        return own.do_record(asked.formula)
    check, new_ones, chosen = asked.check, asked.new, asked.names or [*methods(), *TABLES]
    if unknown := sorted({*chosen} - {*methods(), *TABLES}):
        options.error(f"no method or table {', '.join(unknown)}; there are {', '.join([*methods(), *TABLES])}")
    driver, bad = open_driver("peft"), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if check else store.folder()
        recorder.record_bases(folder)
        if check and (folder / "bases.json").read_text() != (store.folder() / "bases.json").read_text():
            bad.append("bases.json: other base models, or other shapes")
        for name in [n for n in chosen if n in TABLES]:
            rows, known = TABLES[name](driver), {(r["method"], r.get("id")): r for r in store.rows(name)}
            if new_ones:
                rows = [known.get((r["method"], r.get("id")), r) for r in rows]
            if check and rows != store.rows(name):
                bad += [f"{name}: now {a}, stored {b}" for a, b in zip(rows, store.rows(name)) if a != b][:5] or [
                    f"{name}: another number of rows"]
            elif not check:
                store.write_rows(folder, name, rows)
            print(f"{name}: {len(rows)} rows", flush=True)
        for name in [n for n in chosen if n not in TABLES]:
            kept = store.packs().get(name) if new_ones else None
            bad += recorder.record_method(methods()[name], driver, folder, kept)
            if check:
                new, old = store.Pack(folder / "methods" / f"{name}.json"), store.packs().get(name)
                bad += recorder.differences(new, old) if old else [f"{name}: there is no such pack"]
            print(f"{name}: {len(methods()[name].rows)} cases", flush=True)
        store.packs.cache_clear()
        bad += states.record(driver, folder, chosen, new_ones, check)
    print("\n".join(bad) if bad else ("all packs are as recorded" if check else "recorded"))
    return 1 if bad else 0


def do_freeze() -> int:
    """Note the meaning of new case ids; ids noted before stay as they are."""
    path = store.folder() / "ids.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    new = {c.id: store.meaning(c) for c in store.all_cases() if c.id not in known}
    path.write_text(json.dumps(dict(sorted({**known, **new}.items())), indent=1) + "\n")
    print(f"{len(new)} new ids, {len(known)} as before")
    return 0


def do_compare(args: list[str]) -> int:
    """Lay reports side by side, on the terminal and on a page."""
    options = parser("compare", "Lay reports side by side.")
    options.add_argument("reports", nargs="+", metavar="REPORT", help="what --json wrote")
    options.add_argument("--html", help="write one static page")
    chosen = options.parse_args(args)
    try:
        reports = side_by_side.load(chosen.reports)
    except ValueError as error:
        options.error(str(error))
    side_by_side.print_table(reports, terminal.console())
    if chosen.html:
        side_by_side.write(chosen.html, reports, methods())
    return 0


def do_explain(args: list[str]) -> int:
    """Print a case: config, formula, numbers, and the command that runs it alone."""
    options = parser("explain", "Print a case, as Python.")
    options.add_argument("case", metavar="CASE[:CHECK]", help="for example lora/linear/rslora:merge")
    options.add_argument("--impl", default="minipeft", help="for the command that is printed")
    chosen = options.parse_args(args)
    try:
        print(explain.page(chosen.case, chosen.impl), end="")
    except LookupError as error:
        options.error(str(error))
    return 0


COMMANDS = {"record": do_record, "compare": do_compare, "explain": do_explain, "laws": own.main,
            **{name: alone(name, function) for name, function in {
                "freeze": do_freeze, "power": power.main, "coverage": coverage.main,
                "disputed": disputed.main}.items()}}


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return cli.main(argv)
