"""The pages put together: the frame around each, what they share, and the check that every link resolves."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from . import html
from .method_pages import KINDS
from .page import Page

STATIC = Path(__file__).with_name("static")


def write(pages: list[Page], folder: Path) -> None:
    """The whole site, in place of what was in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(STATIC, folder / "static")
    listed = [page for page in pages if page.group != "source"]
    for page in pages:
        target = folder / page.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(framed(page, listed), encoding="utf-8")
        for name, content in page.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def framed(page: Page, listed: list[Page]) -> str:
    up = "../" * page.path.count("/")
    scripts = "".join(f'<script src="{up}static/{name}" defer></script>' for name in ("page.js", *page.scripts))
    contents = f'<nav id="sidebar" aria-label="Contents">{sidebar(page, listed, up)}</nav>' if page in listed else ""
    menu = '<button id="menu" aria-expanded="false" aria-controls="sidebar">Contents</button>' if contents else ""
    heading = page.title if page.path == "index.html" else f"{page.title} · minipeft"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(heading)}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{up}static/style.css">
{scripts}
</head>
<body class="{page.group.replace(" ", "-")}">
<a class="skip" href="#main">Skip to the text</a>
<header class="top">
{menu}
<a class="brand" href="{up}index.html">minipeft, the book</a>
<button id="theme" aria-label="switch between light and dark">Theme</button>
</header>
<div class="frame">
{contents}
<main id="main" tabindex="-1">
{relative(page.body, up)}
{neighbours(page, listed, up)}
</main>
</div>
</body>
</html>
"""


def sidebar(page: Page, listed: list[Page], up: str) -> str:
    groups: dict[str, list[Page]] = {}
    for other in listed:
        groups.setdefault(other.group, []).append(other)
    made = ['<label class="find"><span>Find a page</span><input id="find" type="search" autocomplete="off" '
            'placeholder="lora, rotation, prompt ..."></label><p id="found" class="quiet" role="status"></p>']
    for group in ("chapter", *(kind for kind in KINDS if kind in groups)):
        said = "Chapters" if group == "chapter" else group.capitalize()
        items = "".join(
            f'<li data-words="{html.escape(f"{p.title} {p.summary} {p.words} {group}".lower())}"><a href="{up}{p.path}"'
            f"{current(p, page)}>{html.escape(p.title)}</a></li>" for p in groups[group])
        more = f' <span class="quiet">{html.escape(KINDS[group])}</span>' if group in KINDS else ""
        made.append(f"<section><h2>{said}{more}</h2><ul>{items}</ul></section>")
    return "".join(made)


def current(other: Page, page: Page) -> str:
    return ' aria-current="page"' if other is page else ""


def neighbours(page: Page, listed: list[Page], up: str) -> str:
    """Links to the pages before and after, in the order of the sidebar."""
    same = [other for other in listed if (other.group == "chapter") == (page.group == "chapter")]
    if page not in same:
        return ""
    place = same.index(page)
    made = []
    if place:
        made.append(f'<a rel="prev" href="{up}{same[place - 1].path}">← {html.escape(same[place - 1].title)}</a>')
    if place + 1 < len(same):
        made.append(f'<a rel="next" href="{up}{same[place + 1].path}">{html.escape(same[place + 1].title)} →</a>')
    return f'<nav class="neighbours" aria-label="Neighbouring pages">{"".join(made)}</nav>'


def relative(body: str, up: str) -> str:
    """The links of a page, which are from the site's root on, from where the page is."""
    return re.sub(r'(<a [^>]*?href=|<img [^>]*?src=)"(?!https?:|#|mailto:|data:)([^"]+)"', rf'\1"{up}\2"', body)


class Anchors(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.faults: list[str] = []
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if given.get("id"):
            self.ids.append(given["id"] or "")
        self.links += [v for k, v in attributes if k in ("href", "src") and v]
        if tag == "img" and not given.get("alt"):
            self.faults.append("an image without words")
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))


def faults(folder: Path) -> list[str]:
    """What is wrong with a written site: links and anchors that lead nowhere, ids given twice, no or two titles."""
    read: dict[Path, Anchors] = {}
    for file in folder.rglob("*.html"):
        read[file.resolve()] = anchors = Anchors()
        anchors.feed(file.read_text(encoding="utf-8"))
    found = []
    for file, anchors in sorted(read.items()):
        name = file.relative_to(folder.resolve())
        found += [f"{name}: {fault}" for fault in anchors.faults]
        if anchors.headings.count(1) != 1:
            found.append(f"{name}: {anchors.headings.count(1)} titles")
        found += [f"{name}: the id {i!r} is given {n} times" for i, n in Counter(anchors.ids).items() if n > 1]
        for link in set(anchors.links):
            if re.match(r"https?:|data:|mailto:", link):
                continue
            path, anchor = urldefrag(link)
            target = Path(os.path.normpath(file.parent / unquote(path))) if path else file
            if not target.exists():
                found.append(f"{name}: nothing is at {link}")
            elif anchor and target.suffix == ".html" and unquote(anchor) not in read[target].ids:
                found.append(f"{name}: {link} has no such anchor")
    return found
