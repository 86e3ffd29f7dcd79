"""What the method files say of themselves: for the README's table, the tests of the counts, and the book."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minipeft.core import adapter, registry
from minipeft.core import bases as base
from minipeft.core import quantised as quant
from minipeft.core.config import CONFIGS, PeftType, PromptLearningConfig

registry.load_all()
KINDS = (adapter.Delta, adapter.Transform, adapter.Activation, adapter.Routed, adapter.Replacement)
OTHER = {"prompt": "the model's input", "whole module": "attention"}  # what methods of other kinds adapt
FUNCTIONS = {"min": min, "max": max, "len": len, "ceil": math.ceil, "floor": math.floor}  # in counts


@dataclass(frozen=True)
class MethodFile:
    """One method in one of its forms."""

    peft_type: PeftType
    cls: type
    first: type  # of the classes of that type

    @property
    def doc(self) -> str:
        return sys.modules[self.cls.__module__].__doc__ or ""

    @property
    def name(self) -> str:
        name = re.split(r" [-–] ", self.doc.splitlines()[0])[0]
        return name + (f" ({self.cls.__name__.lower()})" if self.shares_its_file else "")

    @property
    def shares_its_file(self) -> bool:
        """Whether another form of the method stands before it in the same file."""
        return self.cls is not self.first and self.cls.__module__ == self.first.__module__

    @property
    def kind(self) -> str:
        other = "prompt" if issubclass(self.cls, PromptLearningConfig) else "whole module"
        return next((k.__name__.lower() for k in KINDS if issubclass(self.cls, k)), other)

    @property
    def formula(self) -> str:
        """The first formula of the docstring."""
        indented = (line.strip() for line in self.doc.splitlines()[1:] if line.startswith("    "))
        return re.split(r"\s{2,}", next(indented, ""))[0].rstrip(",")

    @property
    def layers(self) -> str:
        """The kinds of layer that it adapts."""
        return OTHER.get(self.kind) or ", ".join(adapted_by(self.cls))

    @property
    def merges(self) -> bool:
        return self.kind not in ("routed", *OTHER) and self.layers != "GPTQ"  # which cannot be written to

    @property
    def paper(self) -> str:
        link = re.search(r"https?://[^\s,;]*[^\s,;.)]", self.doc)
        return link[0] if link else ""


def described() -> Iterator[MethodFile]:
    """Each of minipeft's methods in each of its forms."""
    for peft_type in map(PeftType, registry.FILES):
        classes: list[Any] = adapter.ADAPTERS.get(peft_type) or [CONFIGS[peft_type]] if peft_type in CONFIGS else []
        for cls in classes:
            yield MethodFile(peft_type, cls, classes[0])


def slug(name: str) -> str:
    """`(IA)^3` as `ia3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(", "").replace(")^", "")).strip("-")


def path_of(method: MethodFile) -> str:
    return f"methods/{slug(method.name)}.html"


def methods() -> list[MethodFile]:
    """One for each method's file: a form that shares another one's file is told of on its page."""
    return sorted((m for m in described() if not m.shares_its_file), key=lambda m: m.name.lower())


def count(doc: str) -> str | None:
    """What a docstring's line `parameters` says, for example `r (in + out), or r out with para=True`, or None."""
    lines = re.search(r"^    parameters  +(.+(?:\n     +.+)*)", doc, re.M)
    return " ".join(lines[1].split()) if lines else None


def forms(stated: str) -> list[tuple[list[tuple[str, bool]], dict[str, str]]]:
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


def names_in(expression: str) -> list[str]:
    """The names that an expression of a count needs values for, `in` and `out` among them."""
    return [name for name in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", expression)) if name not in FUNCTIONS]


def code(expression: str) -> str:
    """An expression of a count as both Python and JavaScript compute it, with `n_in` for `in`.

    Names standing side by side are multiplied, ^ is a power.
    """
    tokens = re.findall(r"\d+\.?\d*|\w+|\S", expression)
    found = []
    for before, token in zip(["+", *tokens], tokens):
        ends = re.fullmatch(r"[\w.]+|\)", before) and before not in FUNCTIONS
        found += ["*"] * bool(ends and re.fullmatch(r"[\w.]+|\(", token))
        found.append({"in": "n_in", "^": "**"}.get(token, token))
    return " ".join(found)


def evaluated(expression: str, values: dict[str, Any]) -> float:
    """An expression's value; `values` has those of its names."""
    return eval(code(expression), {**FUNCTIONS, **values, "n_in": values["in"]})


def adapted_by(cls: Any) -> list[str]:
    """The kinds of layer that a class adapts itself: it may leave some to the method that it is a variant of."""
    own = [name for name in cls.bases if cls.for_base(object.__new__(getattr(base, name))) is cls]
    narrower = [kind for kind in vars(quant).values() if isinstance(kind, type) and issubclass(kind, base.Base)]
    return own or [kind.__name__ for kind in narrower if cls.for_base(object.__new__(kind)) is cls]
