"""The table of methods in README.md, generated from the method files: `python tests/methods_table.py` writes it."""

import re
import sys
from pathlib import Path

from minipeft.core import adapter, registry
from minipeft.core import bases as base
from minipeft.core import quantised as quant
from minipeft.core.config import CONFIGS, PeftType, PromptLearningConfig

registry.load_all()
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
KINDS = (adapter.Delta, adapter.Transform, adapter.Activation, adapter.Routed, adapter.Replacement)
OTHER = {"prompt": "the model's input", "whole module": "attention"}  # what methods of other kinds adapt


def described():
    """Each method in each of its forms: (peft_type, class, the first class of that type, docstring of its file)."""
    for peft_type in PeftType:
        classes = adapter.ADAPTERS.get(peft_type) or [CONFIGS[peft_type]] if peft_type in CONFIGS else []
        for cls in classes:
            yield peft_type, cls, classes[0], sys.modules[cls.__module__].__doc__


def count(doc):
    """What a docstring's line `parameters` says, for example `r (in + out), or r out with para=True`, or None."""
    lines = re.search(r"^    parameters  +(.+(?:\n     +.+)*)", doc, re.M)
    return " ".join(lines[1].split()) if lines else None


def forms(stated):
    """The parts of a count: for each form of the method the terms (expression, whether once in all), and its fields.

    "r in, and r out in all, or r with a=b" gives [([("r in", False), ("r out", True)], {}), ([("r", False)],
    {"a": "b"})].
    """
    found = []
    for form in stated.split(", or "):
        form, _, fields = form.partition(" with ")
        terms = [(term.removesuffix(" in all"), term.endswith(" in all")) for term in form.split(", and ")]
        found.append((terms, dict(field.split("=", 1) for field in fields.split(", ") if field)))
    return found


def cell(stated):
    """A count as the table shows it."""
    shown = []
    for terms, fields in forms(stated):
        parts = ", and ".join(f"`{term}`{' in all' * once}" for term, once in terms)
        shown.append(parts + " with " * bool(fields) + ", ".join(f"`{name}={value}`" for name, value in fields.items()))
    return ", or ".join(shown)


def adapted_by(cls):
    """The kinds of layer that a class adapts itself: it may leave some to the method that it is a variant of."""
    own = [name for name in cls.bases if cls.on(object.__new__(getattr(base, name))) is cls]
    narrower = [kind for kind in vars(quant).values() if isinstance(kind, type) and issubclass(kind, base.Base)]
    return own or [kind.__name__ for kind in narrower if cls.on(object.__new__(kind)) is cls]


def rows():
    """One row for each method file: name, kind, formula, parameters, layers, merges, paper."""
    found = []
    for peft_type, cls, first, doc in described():
        name = re.split(r" [-–] ", doc.splitlines()[0])[0]
        name += f" ({cls.__name__.lower()})" if peft_type == PeftType.MISS and cls is not first else ""
        link = re.search(r"https?://[^\s,;]*[^\s,;.)]", doc)
        other = "prompt" if issubclass(cls, PromptLearningConfig) else "whole module"
        kind = next((k.__name__.lower() for k in KINDS if issubclass(cls, k)), other)
        indented = (line.strip() for line in doc.splitlines()[1:] if line.startswith("    "))
        formula = re.split(r"\s{2,}", next(indented, ""))[0].rstrip(",").replace("|", "\\|")
        layers = OTHER.get(kind) or ", ".join(adapted_by(cls))
        merges = "no" if kind in ("routed", *OTHER) or layers == "GPTQ" else "yes"  # which cannot be written to
        paper = f"[paper]({link[0]})" if link else ""
        trained = cell(count(doc) or "?")
        found.append((name, peft_type.value, kind, f"`{formula}`", trained, layers, merges, paper))
    return sorted(found, key=lambda row: row[0].lower())


def table():
    """The table as Markdown."""
    head = ("method", "`peft_type`", "kind", "formula", "parameters", "adapts", "merges", "paper")
    lines = [head, ["---"] * len(head), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(text):
    """The README's text with the table brought up to date."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
