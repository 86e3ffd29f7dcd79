"""minipeft's own files as pages, and where in them a name stands."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from . import html
from .page import Page

ROOT = Path(__file__).parents[1]


def page_of(file: Path) -> str:
    """The page of a file of the repository."""
    return "source/" + file.resolve().relative_to(ROOT).with_suffix(".html").as_posix()


def resolve(name: str) -> tuple[Any, str]:
    """The object of a dotted name, and the address of its first line."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = inspect.getattr_static(found, part)
            found = getattr(found, "__func__", getattr(found, "fget", None) or found)
        return found, address(found)
    raise LookupError(f"nothing is called {name}")


def address(found: Any) -> str:
    """The page and line where a module, class or function is written."""
    found = inspect.unwrap(found)
    file = inspect.getsourcefile(found)
    assert file is not None
    first = "" if inspect.ismodule(found) else f"#L{inspect.getsourcelines(found)[1]}"
    return page_of(Path(file)) + first


def pages() -> list[Page]:
    """A page for each file of minipeft."""
    made = []
    for file in sorted((ROOT / "minipeft").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if not text.strip():
            continue
        name = file.relative_to(ROOT).as_posix()
        body = f"<h1><code>{name}</code></h1>" + html.code(text, first=1)
        made.append(Page(page_of(file), name, body, "source"))
    return made
