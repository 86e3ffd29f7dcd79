"""Several reports on one page that needs no network: implementations and releases, method by method."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import fields
from html import escape
from pathlib import Path

from rich import box
from rich.table import Table

from ..runner import Result
from .html import NAMES, SCRIPT, STYLE
from .terminal import ORDER, STYLES, grouped, names_of
from .terminal import cell as terminal_cell

MOST_GROUPS, MOST_TEXT = 12, 300  # told of one implementation and method, and of one kind of failure
MORE_STYLE = """
body { max-width: 1600px; }
.bar { display: flex; height: 12px; width: 260px; border-radius: 6px; overflow: hidden; background: var(--none); }
.bar i { height: 100%; } .bar .pass { background: #4f9d6d; } .bar .known-issue { background: #d3a43c; }
.bar .fail, .bar .error { background: #c4473a; } .bar .unsupported { background: var(--none); }
td.n { text-align: right; padding: 3px 10px; } td.left { text-align: left; padding: 3px 8px; }
thead th { vertical-align: bottom; white-space: normal; min-width: 66px; max-width: 110px; }
tbody th { position: sticky; left: 0; background: var(--bg); } details tbody th { background: var(--card); }
h3 { font-size: 14px; margin: 14px 14px 4px; } details .wide { padding: 0 14px 10px; }
"""


class Report:
    """What `--json` wrote: one run of the suite on one implementation."""

    def __init__(self, path):
        try:
            head, *lines = (json.loads(line) for line in Path(path).read_text().splitlines())
            self.info, self.profile = head["implementation"], head["profile"]
            known = {f.name for f in fields(Result)}
            self.results = [Result(**{k: v for k, v in line.items() if k in known}) for line in lines]
            self.name, self.version = self.info["name"], self.info["version"]
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no report that `python -m conformance --json` wrote") from error
        if len(self.results) != head.get("results"):
            raise ValueError(f"{path} is cut off: it holds {len(self.results)} of {head.get('results')} results")
        self.by_method: dict[str, list[Result]] = {}
        for r in self.results:
            self.by_method.setdefault(r.method, []).append(r)

    @property
    def title(self):
        return f"{self.name} {self.version}"

    def of(self, method: str) -> list[Result]:
        return self.by_method.get(method, [])


def load(paths) -> list[Report]:
    """The reports in the order given, releases of one implementation together and in their order."""
    reports = [Report(p) for p in paths]
    first = {r.name: i for i, r in reversed(list(enumerate(reports)))}
    return sorted(reports, key=lambda r: (first[r.name], [int(n) for n in re.findall(r"\d+", r.version)]))


def methods_of(reports) -> list[str]:
    return sorted({r.method for report in reports for r in report.results})


def checks_of(results) -> list[str]:
    return list(dict.fromkeys(r.check for r in results))


def changes(old: Report, new: Report) -> dict[str, list[Result]]:
    """Of the results that both reports hold: which became right, wrong, claimed, or not claimed any more."""
    was = {r.id: r.outcome for r in old.results}
    kinds: dict[str, list[Result]] = {"mended": [], "broken": [], "new": [], "gone": []}
    bad = ("fail", "error", "known-issue")
    for r in new.results:
        before = was.get(r.id, r.outcome)
        if before == r.outcome or {before, r.outcome} <= set(bad):
            continue
        kind = (
            "new"
            if before == "unsupported"
            else "gone"
            if r.outcome == "unsupported"
            else "mended"
            if r.outcome == "pass"
            else "broken"
        )
        kinds[kind].append(r)
    return kinds


def pairs(reports) -> list[tuple[Report, Report]]:
    """Each release with the one before it."""
    return [(a, b) for a, b in itertools.pairwise(reports) if a.name == b.name]


def told_by_method(results) -> str:
    counts = Counter(r.method for r in results)
    return ", ".join(f"{method} {n}" for method, n in sorted(counts.items()))


def print_table(reports, console) -> None:
    """Methods down, implementations across, and what changed from one release to the next."""
    table = Table("method", *(r.title for r in reports), box=box.SIMPLE, pad_edge=False)
    for method in methods_of(reports):
        cells = (terminal_cell(r.of(method)) for r in reports)
        table.add_row(method, *(f"[{style}]{text}[/]" for text, style in cells))
    totals = [Counter(r.outcome for r in report.results) for report in reports]
    for outcome in ORDER[:-1]:
        if any(t[outcome] for t in totals):
            table.add_row(f"[{STYLES[outcome]}]{outcome}[/]", *(str(t[outcome] or "") for t in totals))
    console.print(table)
    for old, new in pairs(reports):
        for kind, results in changes(old, new).items():
            if results and kind in ("mended", "broken"):
                console.print(f"{old.title} -> {new.version}, {kind}: {told_by_method(results)}", highlight=False)


def cell(report: Report, name: str, results, link: str) -> str:
    """How many passed of what is claimed; `link`: where it leads."""
    if not results:
        return '<td class="not" title="not run"><span>&middot;</span></td>'
    counts = Counter(r.outcome for r in results)
    claimed = len(results) - counts["unsupported"]
    worst = next(o for o in ORDER if counts[o])
    shown = "pass" if worst == "unsupported" and claimed else worst
    text = "&ndash;" if not claimed else str(claimed) if counts["pass"] == claimed else f"{counts['pass']} / {claimed}"
    title = f"{report.title}, {name}: " + ", ".join(f"{n} {NAMES[o]}" for o, n in counts.most_common())
    inside = f'<a href="{link}">{text}</a>' if link else f"<span>{text}</span>"
    return f'<td class="{shown}" title="{escape(title)}">{inside}</td>'


def overview(reports) -> str:
    rows = ""
    for report in reports:
        counts = Counter(r.outcome for r in report.results)
        tried = {r.method for r in report.results if r.outcome != "unsupported"}
        claimed = max(len(report.results) - counts["unsupported"], 1)
        bar = "".join(
            f'<i class="{o}" style="width:{100 * counts[o] / claimed:.2f}%"></i>'
            for o in ("pass", "known-issue", "fail", "error")
            if counts[o]
        )
        numbers = "".join(
            f'<td class="n">{counts[o] or ""}</td>' for o in ("pass", "known-issue", "fail", "error", "unsupported")
        )
        rows += (
            f'<tr><th scope="row">{escape(report.title)}</th><td class="left">{escape(report.profile)}</td>'
            f'<td class="n">{len(tried)}</td><td class="left"><div class="bar">{bar}</div></td>{numbers}</tr>'
        )
    return (
        "<table><thead><tr><th></th><th>profile</th><th>methods</th><th>of what it claims</th><th>passed</th>"
        "<th>known issues</th><th>failed</th><th>crashed or hung</th><th>unsupported</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def heads(reports) -> str:
    return "".join(f"<th>{escape(r.name)}<br>{escape(r.version)}</th>" for r in reports)


def item(group) -> str:
    """Results with one cause, in one paragraph."""
    r = group[0]
    likely = f"<div>Likely mistake: {escape(r.cause.partition(': ')[2])}</div>" if r.cause else ""
    link = f' <a href="{escape(r.link)}">{escape(r.link)}</a>' if r.link.startswith("https://") else ""
    message = r.message + (f": expected {r.expected}, got {r.got}" if r.expected and r.by is None else "")
    message = message if len(message) <= MOST_TEXT else message[:MOST_TEXT] + " ..."
    return (
        f'<div class="item"><span class="tag {r.outcome}">{r.outcome}</span><code>{escape(names_of(group, 2))}</code>'
        f"{likely}<div>{escape(message)}{link}</div></div>"
    )


def block(method: str, reports, about) -> str:
    """One method, for those that claim it: check by check, then what did not pass."""
    own = {report: report.of(method) for report in reports}
    own = {report: found for report, found in own.items() if any(r.outcome != "unsupported" for r in found)}
    checks = checks_of(r for results in own.values() for r in results if r.outcome != "unsupported")
    rows = ""
    for check in checks:
        cells = (cell(report, check, [r for r in results if r.check == check], "") for report, results in own.items())
        rows += f'<tr><th scope="row">{escape(check)}</th>{"".join(cells)}</tr>'
    told = ""
    for report, results in own.items():
        groups = grouped(r for r in results if r.outcome not in ("pass", "unsupported"))
        more = len(groups) - MOST_GROUPS
        told += f"<h3>{escape(report.title)}</h3>" if groups else ""
        told += "".join(map(item, groups[:MOST_GROUPS]))
        told += f'<p class="item soft">... and {more} other kinds.</p>' if more > 0 else ""
    title, equation = (about.title, about.equation) if about else (method, "")
    return (
        f'<details id="{escape(method)}"><summary><b>{escape(title)}</b> <span class="soft">{escape(equation)}'
        f'</span></summary><div class="wide"><table><thead><tr><th></th>{heads(own)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{told}</details>"
    )


def releases(reports) -> str:
    words = {"mended": "mended", "broken": "broken", "new": "newly claimed", "gone": "not claimed any more"}
    rows = ""
    for old, new in pairs(reports):
        for kind, results in changes(old, new).items():
            if results:
                rows += (
                    f'<tr><th scope="row">{escape(old.title)} &rarr; {escape(new.version)}</th>'
                    f'<td class="left">{words[kind]}</td><td class="n">{len(results)}</td>'
                    f'<td class="left">{escape(told_by_method(results))}</td></tr>'
                )
    if not rows:
        return ""
    return (
        '<h2>From release to release</h2><p class="soft">Results that ended otherwise than in the release before, '
        'and how many of each method.</p><div class="wide"><table><thead><tr><th></th><th></th><th>results</th>'
        f"<th>methods</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def page(reports, methods) -> str:
    """`methods`: name -> what the suite knows of a method."""
    rows = ""
    for name in methods_of(reports):
        about = methods.get(name)
        head = f'<a href="{escape(about.paper)}">{escape(about.title)}</a>' if about else escape(name)
        rows += (
            f'<tr><th scope="row">{head}</th>'
            + "".join(cell(r, name, r.of(name), f"#{name}") for r in reports)
            + f'<th class="eq">{escape(about.equation) if about else ""}</th></tr>'
        )
    blocks = "".join(block(name, reports, methods.get(name)) for name in methods_of(reports))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>PEFT conformance side by side</title><style>{STYLE}{MORE_STYLE}</style></head><body>
<h1>PEFT conformance, side by side</h1>
<p class="soft">The same checks for every implementation: golden data recorded from peft 0.21.2 in float64, NumPy
formulas from the papers, laws, life cycles, and bad input that must be refused. A known issue is a wrong answer that is
listed with its link and evidence; what an implementation does not claim is no failure.</p>
<div class="wide">{overview(reports)}</div>
<h2>Method by method</h2>
<p class="soft"><span class="tag pass">12</span>all that is claimed passed
<span class="tag fail">10 / 12</span>failed or crashed <span class="tag known-issue">11 / 12</span>known issue
<span class="tag unsupported">&ndash;</span>not claimed <span class="tag not">&middot;</span>not run.
Open a cell for its checks, and for what went wrong.</p>
<div class="wide"><table><thead><tr><th></th>{heads(reports)}<th></th></tr></thead><tbody>{rows}</tbody></table></div>
{releases(reports)}
<h2>Results</h2>{blocks}
<script>{SCRIPT}</script></body></html>
"""


def write(path, reports, methods) -> None:
    Path(path).write_text(page(reports, methods))
