"""The experiments side by side: a table that can be sorted, and a plot of it that can be filtered."""

from __future__ import annotations

from . import html, pictures
from .blocks import Html
from .method_files import MethodFile, path_of
from .method_pages import KINDS
from .training import Trained

COLUMNS = [("name", "method"), ("kind", "kind"), ("parameters", "trained"), ("after", "accuracy"),
           ("step", "a step, ms"), ("memory", "held, KiB")]
AXES = {"parameters": "trained parameters", "step": "milliseconds for a step of training",
        "memory": "KiB held while training, beside the weights"}


def compared(rows: list[Trained], methods: list[MethodFile], title: str) -> Html:
    """Both, for one experiment; `methods` are those with a page."""
    pages = {m.cls.__module__: m for m in methods}
    rows = sorted(rows, key=lambda row: -row.after)
    kinds = [kind for kind in KINDS if any(pages[row.module].kind == kind for row in rows)]
    choices = "".join(f'<option value="{field}">{label}</option>' for field, label in AXES.items())
    boxes = "".join(f'<label class="box"><input type="checkbox" name="kind" value="{kind}" checked> {kind}</label>'
                    for kind in kinds)
    head = "".join(
        f"<th scope='col'>{label}</th>" if field == "kind" else
        f'<th scope="col"{sort(field)}><button type="button" data-field="{field}">{label}</button></th>'
        for field, label in COLUMNS)
    body = "".join(line(row, pages[row.module]) for row in rows)
    return Html(
        '<div class="choosing"><form aria-label="what the plot shows"><label>Against '
        f'<select name="x">{choices}</select></label><fieldset><legend>Kinds</legend>{boxes}'
        '</fieldset><p class="quiet"><output></output> methods'
        f'</p></form><div class="scroll" tabindex="0" role="region" aria-label="plot"><svg viewBox="0 0 760 430" '
        f'role="img" aria-label="{html.escape(title)}: accuracy of each method; the table below has the numbers"></svg>'
        f'</div><div class="scroll" tabindex="0" role="region" aria-label="{html.escape(title)}">'
        f'<table class="numbers"><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>")


def sort(field: str) -> str:
    return ' aria-sort="descending"' if field == "after" else ""


def line(row: Trained, method: MethodFile) -> str:
    data = {"name": row.name, "kind": method.kind, "parameters": row.parameters, "after": row.after,
            "step": f"{1e3 * row.step:.4g}", "memory": f"{row.memory / 1024:.0f}"}
    given = " ".join(f'data-{key}="{html.escape(str(value))}"' for key, value in data.items())
    return (f'<tr {given}><td><a href="{path_of(method)}">{html.escape(row.name)}</a></td><td>{method.kind}</td>'
            f"<td>{row.parameters:,}</td><td>{row.after:.1%}</td><td>{1e3 * row.step:.1f}</td>"
            f"<td>{row.memory / 1024:,.0f}</td></tr>")


def ranks(rows: list[Trained]) -> Html:
    """How much of W each method changed, against the rank of the change."""
    drawn, axes = pictures.figure(figsize=(6.6, 3.4))
    for row in rows:
        if row.W is not None and row.merged_W is not None and min(row.W.shape) > 1:
            rank, full, size = pictures.facts(row.W, row.merged_W)
            axes.plot(rank / full, size, ".", color=pictures.ACCENT)
            if not 0.8 < size < 3 or row.name in ("LoRA", "HRA"):
                axes.annotate(row.name, (rank / full, size), xytext=(4, 2), textcoords="offset points", fontsize=7)
    axes.set(xlabel="rank of the change, of the most that it could be", ylabel="|ΔW| / |W|", yscale="log")
    return Html(pictures.svg(drawn, "for each merged method: the norm of its change against the rank of it"))
