"""The progress bar, the table of method x check, and what failed."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

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


def grouped(results) -> list[list]:
    """Results with the same message, of one method, told once."""
    groups: dict = {}
    for r in results:
        groups.setdefault((r.method, r.outcome, r.message), []).append(r)
    return list(groups.values())


def failures(results, most: int = 40) -> str:
    lines = []
    groups = grouped(r for r in results if r.outcome in ("fail", "error"))
    for group in groups[:most]:
        r, more = group[0], len(group) - 1
        lines.append(f"{r.outcome.upper()} {r.id}" + (f" and {more} more" if more else "") + f"\n    {r.message}")
        if r.expected:
            lines.append(f"    expected {r.expected[:300]}\n    got      {r.got[:300]}")
    if len(groups) > most:
        lines.append(f"... and {len(groups) - most} other failures; --html or --json tells all")
    return "\n".join(lines)


def console() -> Console:
    """As wide as the table needs where the output is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=200)
