"""The table of methods in README.md, generated from the method files: `python tests/methods_table.py` writes it."""

import re
import sys
from pathlib import Path

from minipeft import adapter, methods  # noqa: F401  (importing the methods registers them)
from minipeft.config import CONFIGS, PeftType

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
KINDS = (adapter.Delta, adapter.Transform, adapter.Activation, adapter.Routed, adapter.Replacement)


def rows():
    """One row for each method file: name, kind, formula, layers, merges, paper."""
    found = []
    for peft_type in PeftType:
        if peft_type not in CONFIGS:
            continue
        classes = adapter.ADAPTERS.get(peft_type) or [CONFIGS[peft_type]]
        for cls in classes:
            doc = sys.modules[cls.__module__].__doc__
            name = re.split(r" [-–] ", doc.splitlines()[0])[0]
            name += f" ({cls.__name__.lower()})" if peft_type == PeftType.MISS and cls is not classes[0] else ""
            link = re.search(r"https?://[^\s,;]*[^\s,;.)]", doc)
            kind = next((k.__name__.lower() for k in KINDS if issubclass(cls, k)), "prompt")
            indented = (line.strip() for line in doc.splitlines()[1:] if line.startswith("    "))
            formula = re.split(r"\s{2,}", next(indented, ""))[0].replace("|", "\\|")
            layers = ", ".join(getattr(cls, "bases", ())) if kind != "prompt" else "the model's input"
            merges = "no" if kind in ("prompt", "routed") else "yes"
            paper = f"[paper]({link[0]})" if link else ""
            found.append((name, peft_type.value, kind, f"`{formula}`", layers, merges, paper))
    return sorted(found, key=lambda row: row[0].lower())


def table():
    """The table as Markdown."""
    head = ("method", "`peft_type`", "kind", "formula", "adapts", "merges", "paper")
    lines = [head, ["---"] * len(head), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(text):
    """The README's text with the table brought up to date."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
