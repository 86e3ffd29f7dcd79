"""Chapters as pages: their text as Markdown, their code with what it gave.

`$W' = W + s B A$` is set as mathematics, in the notation of the docstrings, and
`[words](code:minipeft.core.layer.Layer)` links to where that is written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import markdown
from markdown.extensions.toc import TocExtension

from . import html, notebooks, source
from .blocks import FOLDER, Block, Html, run
from .page import Page

SCRIPTS = {"choosing": ("choosing.js",)}


def pages(given: dict[str, Any]) -> list[Page]:
    """The chapters in the order of their files' names; `given` are names that all of them may use."""
    return [chapter(file, given) for file in sorted(FOLDER.glob("*.md"))]


def chapter(file: Path, given: dict[str, Any]) -> Page:
    name = re.sub(r"^\d+-", "", file.stem)
    title, blocks, _ = run(file, given)
    body = "".join(render(block) for block in blocks)
    files: dict[str, bytes] = {}
    if name.endswith("-from-nothing"):
        files[notebooks.name_of(file)] = notebooks.notebook(title, blocks)
        body += f'<p class="quiet">This chapter is also <a href="{notebooks.name_of(file)}">a notebook</a>.</p>'
    return Page(f"{name}.html", title, body, "chapter", files=files, scripts=SCRIPTS.get(name, ()))


def render(block: Block) -> str:
    if block.kind == "text":
        return text(block.text)
    if "hidden" in block.flags:
        return block.shown if isinstance(block.shown, Html) else ""
    made = html.code(block.text.rstrip("\n"), {"python": "python"}.get(block.kind, block.kind))
    if block.printed:
        made += f'<pre class="output" tabindex="0" aria-label="output">{html.escape(block.printed.rstrip())}</pre>'
    if isinstance(block.shown, Html):
        made += block.shown
    elif block.shown is not None:
        made += f'<pre class="output" tabindex="0" aria-label="value">{html.escape(repr(block.shown))}</pre>'
    return f'<div class="cell">{made}</div>'


def text(source_text: str) -> str:
    """Markdown as HTML."""
    kept: list[str] = []

    def keep(made: str) -> str:
        kept.append(made)
        return f"\ue000{len(kept) - 1}\ue001"

    source_text = re.sub(r"`[^`\n]+`", lambda m: keep(f"<code>{html.escape(m[0][1:-1])}</code>"), source_text)
    source_text = re.sub(r"^\$\$(.+?)\$\$$", lambda m: keep(html.math(m[1].strip(), True)), source_text, flags=re.M)
    source_text = re.sub(r"\$([^$\n]+)\$", lambda m: keep(html.math(m[1])), source_text)
    source_text = re.sub(r"\]\(code:([\w.]+)\)", lambda m: f"]({source.resolve(m[1])[1]})", source_text)
    toc = TocExtension(permalink=False, slugify=lambda value, sep: slug(value, kept))
    made = markdown.markdown(source_text, extensions=["tables", "def_list", "attr_list", "md_in_html", toc])
    for _ in range(2):  # what was kept may hold what was kept
        made = re.sub("\ue000(\\d+)\ue001", lambda m: kept[int(m[1])], made)
    return made


def slug(value: str, kept: list[str]) -> str:
    value = re.sub("\ue000(\\d+)\ue001", lambda m: re.sub("<[^>]+>", "", kept[int(m[1])]), value)
    return re.sub(r"[^a-z0-9]+", "-", re.sub("<[^>]+>", "", value).lower()).strip("-")
