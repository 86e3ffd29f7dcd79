#!/usr/bin/env python
"""Compare a result of run.py with docs/peer.md: is every test that fails explained there?

    python table.py result.json            # exit status 1 when a failure, or a name that is lacking, is not explained
    python table.py result.json --write    # also write the table of files in docs/peer.md anew

The document explains names of peft by `peft.dotted.NAME` and failures by `test_file.py: test_function`, in tables whose
last column is the reason. A failure that is only about the words of an error or a warning needs no explanation.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from run import file_of, function_of, half_of, load_json
from score import HERE, wording

PAGE = HERE.parents[1] / "docs" / "peer.md"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"


def explained(text: str) -> tuple[set[str], dict[str, str]]:
    """The names of peft that the page speaks of, and the heading above each test function."""
    names, functions, heading = set(), {}, ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            continue
        names.update(re.findall(r"`(peft\.[\w.]+)`", line))
        for file, rest in re.findall(r"`(test_\w+)\.py: ([^`]+)`", line):
            functions.update({f"{file}.{name}": heading for name in re.split(r",\s*", rest)})
    return names, functions


def function(test_id: str) -> str:
    """What the page calls the function of a test: `test_config.test_peft_version_is_stored`."""
    return f"{Path(file_of(test_id)).stem}.{function_of(test_id).rpartition('::')[2]}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("result")
    p.add_argument("--write", action="store_true")
    args = p.parse_args()
    result, text = load_json(args.result), PAGE.read_text(encoding="utf-8")
    names, functions = explained(text)
    counts: dict[str, Counter] = defaultdict(Counter)
    strange: dict[str, str] = {}
    met = set()
    for test, outcome in result["outcomes"].items():
        message, kind = result["messages"].get(test, ""), "passed"
        if outcome != "passed":
            met.add(function(test))
            kind = functions.get(function(test), "")
            if wording(outcome, message) or kind == "Other words":
                kind = "words"
            elif not kind:
                strange.setdefault(function(test), " ".join(message.split())[:160])
        counts[Path(file_of(test)).name][kind if kind in ("passed", "words") else "differs"] += 1
    lacking = {line.removeprefix("name ") for line in result["missing"] if line.startswith("name ")} - names
    for name in sorted(strange):
        print(f"not explained in {PAGE.name}: {name}: {strange[name]}")
    for name in sorted(lacking):
        print(f"not offered, and not explained in {PAGE.name}: {name}")
    if not result["meta"]["sample"] and (idle := sorted(functions.keys() - met)):
        print(f"explained in {PAGE.name}, but passing (or of the other half): {', '.join(idle)}")
    total = sum(counts.values(), Counter())
    good = total["passed"] + total["words"]
    print(f"{good} of {total.total()} ({100 * good / total.total():.2f}%) pass, or differ in words only: {dict(total)}")
    if args.write:
        base = load_json(HERE / "baseline.json.gz")["outcomes"]
        there = [test for test, outcome in base.items() if outcome == "passed"]
        half = Counter(Path(file_of(test)).name for test in there if half_of(test) == "open")
        rows = ["| file | tests | run | passed | in other words | differs |", "|---|---|---|---|---|---|"]
        for name, c in [*sorted(counts.items()), ("all", total)]:
            of = half.total() if name == "all" else half[name]
            rows.append(f"| {name} | {of} | {c.total()} | {c['passed']} | {c['words'] or ''} | {c['differs'] or ''} |")
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 1 if strange or lacking else 0


if __name__ == "__main__":
    sys.exit(main())
