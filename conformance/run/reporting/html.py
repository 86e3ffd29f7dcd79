"""One static page, readable without a network: the matrix of method x check, every cell opens to its results."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path

from ...reference.methods import methods
from .terminal import ORDER, grouped, names_of

STYLE = """
:root { --bg: #fbfaf7; --ink: #22252a; --soft: #6b7078; --line: #dedbd3; --card: #ffffff;
  --pass: #d9ecdf; --pass-ink: #1d5c37; --fail: #f3c9c3; --fail-ink: #8c1f14; --known: #f4e3bd; --known-ink: #6d4c00;
  --none: #eceae4; --none-ink: #85888d; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181b; --ink: #e6e4df; --soft: #9a9da3; --line: #33363b;
  --card: #1d2024; --pass: #1f3d2b; --pass-ink: #a5dcb9; --fail: #5a221c; --fail-ink: #ffc2ba; --known: #4a3a14;
  --known-ink: #f3d58e; --none: #26292d; --none-ink: #7d8187; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 28px 32px 60px; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 2px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 10px; }
p { max-width: 78ch; } .soft { color: var(--soft); }
.verdict { display: inline-block; padding: 2px 12px; border-radius: 999px; font-weight: 600; font-size: 14px;
  vertical-align: 4px; margin-left: 10px; }
.tally { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 22px; }
.tally div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 16px;
  min-width: 104px; }
.tally b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 3px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 13px; padding: 4px 5px; white-space: nowrap; }
th.eq { font-weight: 400; color: var(--soft); font: 12px ui-monospace, Menlo, Consolas, monospace; min-width: 210px;
  white-space: normal; }
td { padding: 0; text-align: center; font-size: 13px; border-radius: 5px; min-width: 60px; }
td a, td span { display: block; padding: 5px 8px; color: inherit; text-decoration: none; }
td a:hover, td a:focus { outline: 2px solid var(--ink); border-radius: 5px; }
.pass { background: var(--pass); color: var(--pass-ink); }
.fail, .error { background: var(--fail); color: var(--fail-ink); }
.known-issue { background: var(--known); color: var(--known-ink); }
.unsupported, .not { background: var(--none); color: var(--none-ink); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; }
details:target, details[open] { border-color: var(--soft); }
summary { cursor: pointer; padding: 8px 14px; } summary b { margin-right: 8px; }
.item { padding: 10px 14px; border-top: 1px solid var(--line); }
.item code, pre { font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; }
.tag { font-size: 12px; border-radius: 4px; padding: 1px 7px; margin-right: 8px; font-weight: 600; }
dl { display: grid; grid-template-columns: 84px 1fr; margin: 6px 0 0; gap: 2px 10px; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; } a { color: inherit; }
"""
SCRIPT = """
function show() { const e = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (e && e.tagName === 'DETAILS') { e.open = true; e.scrollIntoView({block: 'start'}); } }
addEventListener('hashchange', show); show();
"""
NAMES = {"pass": "passed", "fail": "failed", "error": "crashed or hung", "known-issue": "known issues",
         "unsupported": "unsupported", "not run": "not run"}


def worst(results):
    counts = Counter(r.outcome for r in results)
    return next(o for o in ORDER if counts[o]), counts


def cell(method, check, results) -> str:
    if not results:
        return '<td class="not" title="does not apply"><span>&middot;</span></td>'
    outcome, counts = worst(results)
    if outcome == "unsupported" and not counts["pass"]:
        text = "&ndash;"
    elif counts["pass"] == len(results):
        text = str(len(results))
    else:
        text = f"{counts['pass']} / {len(results)}"
    shown = "pass" if outcome == "unsupported" and counts["pass"] else outcome
    title = ", ".join(f"{n} {NAMES[o]}" for o, n in counts.items())
    return f'<td class="{shown}" title="{title}"><a href="#{method}-{check}">{text}</a></td>'


def item(group, most: int = 1000) -> str:
    """Results with one cause, told once."""
    r = sorted(group, key=lambda r: r.dtype != "float32")[0]
    fault, _, mistake = r.cause.partition(": ")
    likely = f"{escape(mistake)} (the seeded fault <code>{escape(fault)}</code> gives the same wrong answers)"
    parts = [("expected", r.expected), ("got", r.got),
             ("off by", f"{r.by:.3g} times the tolerance of {r.dtype}" if r.by is not None else "")]
    rows = f"<dt>likely</dt><dd>{likely}</dd>" if r.cause else ""
    rows += "".join(f"<dt>{k}</dt><dd><code>{escape(str(v))}</code></dd>" for k, v in parts if v)
    link = f'<dt>see</dt><dd><a href="{escape(r.link)}">{escape(r.link)}</a></dd>' if r.link else ""
    return (f'<div class="item"><span class="tag {r.outcome}">{r.outcome}</span>'
            f"<code>{escape(names_of(group, most))}</code><div>{escape(r.message)}</div>"
            + (f"<dl>{rows}{link}</dl>" if rows or link else "") + "</div>")


def entry(group, opened: bool) -> str:
    """One cause of failures, in the list of all."""
    r, count = group[0], f"{len(group)} result{'s' * (len(group) > 1)}"
    told = f"likely mistake: {r.cause.partition(': ')[2]}" if r.cause else names_of(group, 1)
    return (f"<details{' open' * opened}><summary><b>{count}</b>{escape(told)}</summary>{item(group, 6)}</details>")


def block(method, check, results) -> str:
    """What stands behind one cell: everything that did not pass, then the names of what did."""
    outcome, counts = worst(results)
    told = sorted((r for r in results if r.outcome != "pass"), key=lambda r: ORDER.index(r.outcome))
    body = "".join(item(group) for group in grouped(told))
    passed = [r.id for r in results if r.outcome == "pass"]
    if passed:
        body += (f'<div class="item"><span class="tag pass">pass</span>'
                 f'<code class="soft">{escape(", ".join(passed))}</code></div>')
    m = methods().get(method)
    formula = f' <span class="soft">{escape(m.equation)}</span>' if m else ""
    summary = ", ".join(f"{n} {NAMES[o]}" for o, n in counts.most_common())
    return (f'<details id="{method}-{check}"><summary><b>{escape(m.title if m else method)} &middot; {check}</b>'
            f'<span class="tag {outcome}">{summary}</span>{formula}</summary>{body}</details>')


def page(info, profile, results, good, seconds) -> str:
    counts = Counter(r.outcome for r in results)
    checks = list(dict.fromkeys(r.check for r in results))
    names = sorted({r.method for r in results})
    by = {(m, c): [r for r in results if r.method == m and r.check == c] for m in names for c in checks}
    name = escape(f"{info['name']} {info['version']}")
    head = "".join(f"<th>{c}</th>" for c in checks)
    rows = ""
    for m in names:
        about = methods().get(m)
        rows += (f'<tr><th scope="row"><a href="{escape(about.paper)}">{escape(about.title)}</a></th>'
                 if about else f"<tr><th>{escape(m)}</th>")
        rows += "".join(cell(m, c, by[m, c]) for c in checks)
        rows += f'<th class="eq">{escape(about.equation) if about else ""}</th></tr>'
    tally = "".join(f'<div><b>{counts[o]}</b>{NAMES[o]}</div>' for o in NAMES if counts[o])
    ordered = sorted(((m, c) for m, c in by if by[m, c]), key=lambda k: (ORDER.index(worst(by[k])[0]), k))
    blocks = "".join(block(m, c, by[m, c]) for m, c in ordered)
    bad = grouped(r for r in results if r.outcome in ("fail", "error"))
    wrong = "<h2>What went wrong</h2>" + "".join(entry(group, len(bad) < 8) for group in bad) if bad else ""
    verdict = f'<span class="verdict {"pass" if good else "fail"}">{"passed" if good else "failed"}</span>'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>PEFT conformance: {name}</title><style>{STYLE}</style></head><body>
<h1>PEFT conformance: {name}{verdict}</h1>
<p class="soft">Profile {profile}, {seconds:.0f} s. Goldens recorded from peft 0.21.2 in float64 and cross-checked by
NumPy formulas; laws drawn by Hypothesis. Open a cell for what was expected, what came, and by how much.</p>
<div class="tally">{tally}</div>
<div class="wide"><table><thead><tr><th></th>{head}<th></th></tr></thead><tbody>{rows}</tbody></table></div>
<p class="soft"><span class="tag pass">12</span>all passed <span class="tag fail">10 / 12</span>failed or crashed
<span class="tag known-issue">11 / 12</span>known issue, with its link
<span class="tag unsupported">&ndash;</span>unsupported <span class="tag not">&middot;</span>does not apply</p>
{wrong}<h2>Results</h2>{blocks}
<script>{SCRIPT}</script></body></html>
"""


def write(path, info, profile, results, good, seconds) -> None:
    Path(path).write_text(page(info, profile, results, good, seconds))
