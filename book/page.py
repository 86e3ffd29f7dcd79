"""What a page of the book is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Page:
    path: str  # from the site's root on
    title: str
    body: str  # HTML of <main>; its links to other pages are from the site's root on
    group: str  # where the sidebar lists it: a chapter, the kind of a method, or "source", which it does not list
    summary: str = ""
    words: str = ""  # what the sidebar's filter finds it by, beside the title
    files: dict[str, bytes] = field(default_factory=dict)  # what it comes with, by path
    scripts: tuple[str, ...] = ()
