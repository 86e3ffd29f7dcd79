"""Chapters before they are set: Markdown whose Python is run.

A block marked `python` runs in the chapter's own namespace, and what it prints stands below it; `python hidden` runs
without being shown, `python raises` must raise. A block that ends in an expression shows its value. `{{ expression }}`
in the text is replaced by its value.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("chapters")
FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```\n", re.M | re.S)


class Html(str):
    """Text that is HTML already."""


@dataclass
class Block:
    """A piece of a chapter: text, or code with what it gave."""

    kind: str  # "text", or the language
    flags: list[str]
    text: str
    printed: str = ""
    shown: Any = None


class Stale(Exception):
    """Something on a page is no longer what the code gives."""


def run(file: Path, given: dict[str, Any]) -> tuple[str, list[Block], dict[str, Any]]:
    """The title of a chapter, its blocks after they ran, and the names that they made; `given` are there before."""
    text = file.read_text(encoding="utf-8")
    title = re.match(r"# (.+)\n", text)
    assert title, f"{file} begins with its title"
    names: dict[str, Any] = {"__name__": f"book.{file.stem}", "Html": Html, **given}
    blocks, at = [], 0
    for fence in FENCE.finditer(text):
        blocks.append(Block("text", [], filled(text[at:fence.start()], names, file)))
        at = fence.end()
        block = Block(fence[1] or "text", fence[2].split(), fence[3])
        if block.kind == "python":
            execute(block, names, f"{file.name}, line {text[:fence.start()].count(chr(10)) + 1}")
        blocks.append(block)
    blocks.append(Block("text", [], filled(text[at:], names, file)))
    return title[1], blocks, names


def execute(block: Block, names: dict[str, Any], where: str) -> None:
    """Run a block. What it prints and the value of its last line are kept."""
    tree = ast.parse(block.text)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(tree, where, "exec"), names)
            if isinstance(last, ast.Expr):
                block.shown = eval(compile(ast.Expression(last.value), where, "eval"), names)
    except Exception as error:
        if "raises" not in block.flags:
            raise Stale(f"{where}:\n{traceback.format_exc()}") from error
        out.write(f"{type(error).__name__}: {error}\n")
    else:
        if "raises" in block.flags:
            raise Stale(f"{where}: it should have raised")
    block.printed = out.getvalue()


def filled(text: str, names: dict[str, Any], file: Path) -> str:
    """The text with its `{{ expressions }}` replaced by their values."""

    def value(match: re.Match[str]) -> str:
        try:
            return str(eval(match[1], names))
        except Exception as error:
            raise Stale(f"{file.name}: {{{{ {match[1]} }}}}: {error!r}") from error

    return re.sub(r"\{\{(.+?)\}\}", value, text)
