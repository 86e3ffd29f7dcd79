"""The progress bar, the table of method x check, and what failed."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..runner import masked

MARKS = {"pass": "", "fail": " FAIL", "error": " ERROR", "known-issue": " known", "unsupported": "", "not run": ""}
STYLES = {"pass": "green", "fail": "bold red", "error": "bold red", "known-issue": "yellow", "unsupported": "dim"}
ORDER = ("error", "fail", "known-issue", "unsupported", "pass", "not run")


class Progress:
    """A bar on stderr, where that is a terminal."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, unit="check", disable=None, leave=False)
        self.bad = 0

    def __call__(self, result):
        self.bad += result.outcome in ("fail", "error")
        self.bar.set_postfix_str(f"{self.bad} bad, {result.case}", refresh=False)
        self.bar.update()

    def close(self):
        self.bar.close()


def cell(results) -> tuple[str, str]:
    """(text, style): how many passed, of how many unless all did, and the worst outcome."""
    if not results:
        return ".", "dim"
    counts = Counter(r.outcome for r in results)
    worst = next(o for o in ORDER if counts[o])
    if worst == "unsupported" and not counts["pass"]:
        return "-", "dim"
    count = str(len(results)) if worst == "pass" else f"{counts['pass']}/{len(results)}"
    return count + MARKS[worst], STYLES["pass" if worst == "unsupported" else worst]


def print_table(results, console: Console) -> None:
    checks = list(dict.fromkeys(r.check for r in results))
    table = Table("method", *checks, box=box.SIMPLE, pad_edge=False)
    for method in sorted({r.method for r in results}):
        cells = (cell([r for r in results if r.method == method and r.check == c]) for c in checks)
        table.add_row(method, *(f"[{style}]{text}[/]" for text, style in cells))
    console.print(table)


def one_cause(r) -> tuple:
    """What results share that have the same cause, as far as the report can tell."""
    if r.cause:
        return (r.cause,)
    if r.outcome == "known-issue":
        return r.link, r.message.split(" | ")[0]
    told = r.outcome, masked(r.message)
    general = r.outcome == "error" or r.message.startswith("refused: ") or r.check in ("laws", "reject")
    return told if general else (r.method, *told)


def grouped(results) -> list[list]:
    """Results with one cause, told once; first those whose cause is known.

    What is computed from a wrong output (merged, saved and loaded, ...) is told with it.
    """
    groups: dict = {}
    results = list(results)
    outputs = {r.case: r for r in results if r.check == "forward" and r.outcome == "fail"}
    for r in results:
        follows = r.outcome == "fail" and r.by is not None and not r.cause
        first = outputs.get(r.case, r) if follows else r
        groups.setdefault(one_cause(first), []).append(r)
    return sorted(groups.values(), key=lambda group: (not group[0].cause, -len(group)))


def names_of(group, most: int) -> str:
    """The names of a group's results, one after the other; of many the first."""
    shown = ", ".join(r.id for r in group[:most])
    return shown + (f" and {len(group) - most} more" if len(group) > most else "")


def failures(results, most: int = 40) -> str:
    lines = []
    groups = grouped(r for r in results if r.outcome in ("fail", "error"))
    for group in groups[:most]:
        group = sorted(group, key=lambda r: r.dtype != "float32")
        r, word = group[0], group[0].outcome.upper()
        if r.cause:
            fault, _, what = r.cause.partition(": ")
            lines.append(f"{word} {len(group)} result{'s' * (len(group) > 1)}. Likely mistake: {what}\n    (the seeded "
                         f"fault {fault} gives the same wrong answers{', see ' + r.link if r.link else ''})\n"
                         f"    {names_of(group, 3)}\n    {r.message}")
        else:
            lines.append(f"{word} {names_of(group, 1)}\n    {r.message}")
        if r.expected:
            lines.append(f"    expected {r.expected[:300]}\n    got      {r.got[:300]}")
    if len(groups) > most:
        lines.append(f"... and {len(groups) - most} other failures; --html or --json tells all")
    if groups and groups[0][0].case.count("/"):
        r = groups[0][0]
        lines.append(f"To see a case with its formula and numbers: python -m conformance explain {r.case}:{r.check}")
    return "\n".join(lines)


def console() -> Console:
    """As wide as the table needs where the output is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=200)
