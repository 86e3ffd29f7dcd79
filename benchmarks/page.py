"""The figures as one static page: a bar for each ratio, its spread, and the numbers behind it."""

import html
from typing import Any

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { padding: .2rem .6rem; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f5f5f5 } svg { display: block }
@media (max-width: 45rem) { td:nth-child(3), th:nth-child(3), td:nth-child(4), th:nth-child(4) { display: none } }
"""
WIDTH, MOST = 240, 2.0  # pixels, and the ratio at the right end


def bar(ratio: dict[str, float]) -> str:
    """A bar as long as the ratio, a line over its spread, and a mark at 1."""
    at = lambda value: round(WIDTH * min(max(value, 0.0), MOST) / MOST, 1)
    colour = "#4a8" if ratio["median"] <= 1.03 else "#c64"
    least, most = at(ratio["least"]), at(ratio["most"])
    return (
        f'<svg width="{WIDTH}" height="16" role="img" aria-label="{ratio["median"]:.2f}">'
        f'<rect y="3" width="{at(ratio["median"])}" height="10" fill="{colour}"/>'
        f'<path d="M{least} 8H{most}M{at(1)} 0V16" stroke="#222" fill="none"/></svg>'
    )


def page(report: dict[str, Any]) -> str:
    ours, theirs = report["machine"]["libraries"]
    versions = ", ".join(f"{name} {version}" for name, version in report["machine"]["versions"].items())
    rows = []
    for quantity, row in report["results"].items():
        unit, values, ratio = row["unit"], row["median"], row.get("ratio")
        shown = "" if ratio is None else f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
        medians = [f"{values[name]:.3g} {unit}" if name in values else "" for name in (ours, theirs)]
        numbers = "".join(f"<td>{html.escape(cell)}</td>" for cell in (*medians, shown))
        plot = bar(ratio) if ratio else ""
        rows.append(f"<tr><td>{html.escape(quantity)}</td><td>{plot}</td>{numbers}</tr>")
    title = html.escape(f"{ours} beside {theirs}")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in ("", f"{ours} / {theirs}", ours, theirs, "ratio"))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(report['machine']['device'])}, "
        f"{html.escape(versions)}; width {report['machine']['width']}, {report['machine']['rounds']} rounds. Ratios "
        "are taken round by round: under 1, marked by the line, less than the other takes. Bars end at "
        f"{MOST:g}.</p><table><tr>{head}</tr>{''.join(rows)}</table></html>\n"
    )
