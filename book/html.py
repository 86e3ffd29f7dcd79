"""Pieces of HTML: escaped text, mathematics, highlighted code."""

from __future__ import annotations

import html
import io
import re
import tokenize

from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from . import notation

escape = html.escape


def math(formula: str, block: bool = False) -> str:
    """A formula in the docstrings' notation as MathML, which a screen reader reads as it was written."""
    return mathml(notation.latex(formula), formula, block)


def mathml(latex: str, spoken: str, block: bool = False) -> str:
    try:
        plain = re.sub(r"\\mathtt\{(.*?)\}", lambda m: "\\text{" + m[1].replace("\\_", "_") + "}", latex)
        made = convert(plain, display="block" if block else "inline")
    except Exception as error:
        raise ValueError(f"no mathematics: {spoken!r}, as LaTeX {latex!r}") from error
    prime = r'<mrow><mi>\1</mi><mo lspace="0" rspace="0">′</mo></mrow>'
    made = re.sub(r"<msup><mi>(\w)</mi><mi>&#x02032;</mi></msup>", prime, made)
    return made.replace("<math ", f'<math aria-label="{escape(spoken)}" ', 1)


def line(text: str) -> str:
    """A line of a docstring: its formulas set as such, names as code, addresses as links."""
    made = []
    for kind, piece in notation.pieces(text):
        if kind == "math":
            lead, core, trail = re.fullmatch(r"(\s*)(.*?)(\s*)", piece, re.S).groups()  # type: ignore[union-attr]
            made.append(lead + "".join(part if part in (", ", "; ") else math(part) for part in apart(core)) + trail)
        elif kind == "code":
            made.append(f"<code>{escape(piece.strip('`'))}</code>")
        elif kind == "link":
            made.append(f'<a href="{escape(piece)}">{escape(re.sub("https?://(www[.])?", "", piece))}</a>')
        else:
            made.append(escape(piece))
    return "".join(made)


def apart(formula: str) -> list[str]:
    """A row of formulas, each by itself, and what stands between: a line can be broken there, and nowhere inside."""
    parts, depth = [""], 0
    for piece in re.split(r"([(\[\])]|[,;] )", formula):
        depth += (piece in ("(", "[")) - (piece in (")", "]"))
        if piece in (", ", "; ") and not depth:
            parts += [piece, ""]
        else:
            parts[-1] += piece
    return [part for part in parts if part]


def prose(text: str) -> str:
    """A paragraph of a docstring or comment: names in backquotes as code, the rest as it is, addresses as links."""
    text = escape(text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"https?://[^\s,;)&]*[^\s,;.)&]", r'<a href="\g<0>">\g<0></a>', text)


def code(text: str, language: str = "python", first: int | None = None) -> str:
    """Highlighted code; with `first`, each line is an anchor `L<number>`."""
    formatter = HtmlFormatter(nowrap=True)
    made = highlight(text, get_lexer_by_name(language, stripnl=False), formatter)
    made = re.sub(r'<span class="(?:n|o|p|w|nb|bp|nn)">([^<]*)</span>', r"\1", made)  # all of the text's colour
    lines = made.rstrip("\n").split("\n")
    if first is not None:
        lines = [f'<span id="L{n}">{text}</span>' for n, text in enumerate(lines, first)]
    numbered = " numbered" if first is not None else ""
    return f'<pre class="code{numbered}" tabindex="0"><code>' + "\n".join(lines) + "</code></pre>"


def table(head: list[str], rows: list[list[str]], kind: str = "", caption: str = "") -> str:
    """A table, in a box that scrolls where the screen is narrow; cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    named = f"<caption>{caption}</caption>" if caption else ""
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or "table")}">'
            f'<table class="{kind}">{named}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def comments(source: str) -> dict[int, str]:
    """The comments of Python source, by line."""
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in found if token.type == tokenize.COMMENT}
