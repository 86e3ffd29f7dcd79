"""The first chapters as executed notebooks, made from the same source as their pages."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from . import notation, source
from .blocks import Block


def notebook(title: str, blocks: list[Block]) -> bytes:
    """A chapter, run from its first cell to its last; a cell that raises fails the build."""
    cells = [new_markdown_cell(f"# {title}")]
    for block in blocks:
        if block.kind == "python":
            cells.append(new_code_cell(block.text.rstrip("\n")))
        elif block.kind == "text" and block.text.strip():
            cells.append(new_markdown_cell(markdown(block.text)))
        elif block.text.strip():
            cells.append(new_markdown_cell(f"```{block.kind}\n{block.text}```"))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    made = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    NotebookClient(made, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(source.ROOT)}},
                   record_timing=False).execute()
    return nbformat.writes(made).encode()


def markdown(text: str) -> str:
    """The text of a chapter for a notebook beside the pages: mathematics as LaTeX, links to the pages."""
    text = re.sub(r"^# .*\n", "", text)
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: f"$${notation.latex(m[1])}$$", text)
    text = re.sub(r"(?<!\$)\$([^$\n]+)\$(?!\$)", lambda m: f"${notation.latex(m[1])}$", text)
    text = re.sub(r"\]\(code:([\w.]+)\)", lambda m: f"](../{source.resolve(m[1])[1]})", text)
    text = re.sub(r"\]\((?!https?:|\.\.)([^)]+)\)", r"](../\1)", text)
    return re.sub(r" ?\{: [^}]*\}", "", text).strip()


def name_of(file: Path) -> str:
    """Where the notebook of a chapter stands on the site."""
    return f"notebooks/{file.stem.split('-', 1)[1]}.ipynb"
