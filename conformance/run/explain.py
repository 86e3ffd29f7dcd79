"""One case on one page: its config, its formula, its numbers, and how to run it alone.

What is printed is Python, so that it can be run, copied from and held against a port step by step.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pprint import pformat
from types import ModuleType

import numpy as np

from ..reference import laws, store
from ..reference.method import Method
from ..reference.methods import methods
from . import plan
from .runner import Task

PACKAGE = __package__.rpartition(".")[0]
WIDTH = 110
ELSEWHERE = ("numpy_model", "formulas", "store", "method")  # run whole models; their sources are not repeated
# What a check compares, by the part of the case that holds it; the model's weights are told of every case.
COMPARED = {
    "forward": ("out", "paper"),
    "gradients": ("cotangent", "grad", "paper_grad"),
    "merge": ("merged", "out", "paper_merged", "paper"),
    "unmerge": ("out", "paper"),
    "disable": ("plain", "out", "paper"),
    "save": ("saved",),
    "keys": ("fresh",),
    "lifecycle": ("second", "trace"),
}


def page(name: str, impl: str = "minipeft") -> str:
    """The explanation of `CASE[:check[:dtype]]`. Raises `LookupError` with the nearest name, if there is none."""
    case_id, _, rest = name.partition(":")
    check = rest.partition(":")[0]
    own = [t for t in all_tasks() if t.case == case_id]
    if not own:
        raise LookupError(f"no case is called {case_id!r}{nearest(case_id, (t.case for t in all_tasks()))}")
    checks = list(dict.fromkeys(t.check for t in own))
    if check and check not in checks:
        raise LookupError(f"{case_id} has no check {check!r}{nearest(check, checks)}")
    task = next(t for t in own if t.check == (check or ("forward" if "forward" in checks else checks[0])))
    method, (function, bound) = methods()[task.method], unbound(task.call)
    case = next((a for a in bound.values() if isinstance(a, store.Case)), None)
    parts = [*head(task, method, case, checks if not check else [], impl)]
    if case:
        parts += [*model(case), *source(method)]
    parts += compared(function, bound)
    parts += numbers(task.check, case) if case else drawn(method) if task.check == "laws" else []
    return "\n".join(parts) + "\n"


@cache
def all_tasks() -> list[Task]:
    return plan.tasks("full")


def nearest(name: str, known) -> str:
    """Of all names the one that was meant, or what there is."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, 1, 0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known[:20])}"


def comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def command(task: Task, impl: str) -> str:
    return f"python -m conformance --impl {impl} --methods {task.method} --checks {task.check} --cases {task.case}"


def head(task: Task, method: Method, case, others: list[str], impl: str) -> Iterator[str]:
    yield comment(f"{task.case}: {task.check}\n{method.title}, {method.paper}\n{method.equation}")
    if case:
        origin = case.pack.data["provenance"]
        golden = "the formula below" if case.golden == "formula" else f"{origin['library']} {origin['version']}"
        yield comment(
            f"Expected numbers: {golden}, in {origin['dtype']}. The adapter moves the output by {case.effect:.0%} of "
            f"its largest value;\nthe nearest wrong implementation that was tried ({case.nearest_fault}) is "
            f"{case.margin:g} float32 tolerances away."
        )
        if case.note:
            yield comment(f"Note: {case.note}")
        if case.data.get("disputed"):
            yield comment(
                f"Disputed: {case.disputed['what']}\nThe parts `paper...` hold the formula's answer; either "
                "one is right."
            )
    yield f"#\n# This alone:\n#   {command(task, impl)}"
    if others:
        yield f"# Its checks, each explained by {task.case}:CHECK:\n#   {', '.join(others)}"


def model(case) -> Iterator[str]:
    yield "\n# adapter_config.json"
    yield f"config = {pformat(case.data['config'], width=WIDTH, sort_dicts=False)}"
    yield f"\n# The base model ({case.base_name}); adapted are {', '.join(case.targets) or 'no layers'}."
    yield f"model = {pformat(case.base, width=WIDTH, sort_dicts=False)}"


# --- the formula's source


class Module:
    """The top-level definitions of a module, and what its imports mean."""

    def __init__(self, module: ModuleType):
        self.name, self.text = module.__name__, inspect.getsource(module)
        self.lines = self.text.splitlines()
        self.defined: dict[str, list[ast.stmt]] = {}
        self.imported: dict[str, tuple[str, str, str]] = {}  # name -> (import statement, module, name there)
        for node in ast.parse(self.text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.defined.setdefault(node.name, []).append(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):  # of names, and of entries of what they name
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}:
                    self.defined.setdefault(name, []).append(node)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self.add_import(node)

    def add_import(self, node: ast.Import | ast.ImportFrom) -> None:
        source = ""
        if isinstance(node, ast.ImportFrom):
            stem = self.name.rsplit(".", node.level)[0] if node.level else ""
            source = ".".join(filter(None, [stem, node.module]))
        for a in node.names:
            words = f"from {source} import {a.name}" if source else f"import {a.name}"
            self.imported[a.asname or a.name] = (words + (f" as {a.asname}" if a.asname else ""), source, a.name)

    def segment(self, node: ast.stmt) -> str:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        text = "\n".join(self.lines[first - 1 : node.end_lineno])
        return re.sub(r"(?m)^(\s+)from (\.+)", lambda m: f"{m[1]}from {self.name.rsplit('.', len(m[2]))[0]}.", text)

    def needed(self, names) -> tuple[list[str], list[str], list[tuple[str, str]]]:
        """(import statements, definitions, (module, name) elsewhere in the suite) that these definitions stand on."""
        nodes: set[ast.stmt] = set()
        imports, elsewhere, left = [], [], list(names)
        while left:
            name = left.pop()
            if name in self.imported and name not in self.defined:
                words, source, there = self.imported[name]
                imports += [words] if words not in imports else []
                if source.startswith(PACKAGE) and f"{source}.{there}" not in sys.modules:
                    elsewhere.append((source, there))
            new = [node for node in self.defined.get(name, ()) if node not in nodes]
            nodes.update(new)
            for n in (n for node in new for n in ast.walk(node)):
                if isinstance(n, ast.Name):
                    left.append(n.id)
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in self.imported:
                    _, source, there = self.imported[n.value.id]
                    if f"{source}.{there}" in sys.modules and source.startswith(PACKAGE):
                        elsewhere.append((f"{source}.{there}", n.attr))
        return imports, [self.segment(n) for n in sorted(nodes, key=lambda n: n.lineno)], elsewhere


def source(method: Method) -> Iterator[str]:
    """The formula and the shapes as they stand in the method's file, with all that they call there."""
    prompt = method.prompt
    functions = [
        method.formula,
        method.run,
        method.route,
        *((prompt.formula, prompt.loss) if prompt else ()),
        method.shapes,
    ]
    by_module: dict[str, list[str]] = {}
    for f in filter(None, functions):
        by_module.setdefault(f.__module__, []).append(f.__name__)
    yield "\n# The formula, and the shapes of the saved tensors in closed form. site.W is (out, in, *kernel), t holds"
    yield "# the adapter's tensors of one layer, by what follows the layer's path in their keys, and c is the config."
    told: set = set()
    for name, names in by_module.items():
        imports, definitions, elsewhere = Module(sys.modules[name]).needed(names)
        yield "\n".join([*sorted(imports), "", *("\n" + d for d in definitions)]).rstrip()
        yield from borrowed(elsewhere, told)


def borrowed(elsewhere, told: set) -> Iterator[str]:
    """What formulas take from other files, as comments: their names may mean something else here."""
    for name, wanted in elsewhere:
        if (name, wanted) in told or name.rpartition(".")[2] in ELSEWHERE:
            continue
        told.add((name, wanted))
        _, definitions, further = Module(sys.modules[name]).needed([wanted])
        yield f"\n# {name.rpartition('.')[2]}.py, for {wanted}:"
        yield comment("\n".join(definitions))
        yield from borrowed(further, told)


# --- what is compared


def unbound(call) -> tuple[Callable, dict]:
    """The check itself, and what is bound to it, out of the partial functions around it."""
    bound: dict = {}
    while isinstance(call, partial):
        inner = next((a for a in call.args if callable(a) or isinstance(a, ModuleType)), call.func)
        bound |= {str(len(bound) + i): a for i, a in enumerate(call.args)} | call.keywords
        call = inner
    return (call.check if isinstance(call, ModuleType) else call), bound


def compared(function, bound: dict) -> Iterator[str]:
    """The source of the check: which operations it asks for, and what it holds against each other."""
    yield f"\n# The check, {function.__module__.removeprefix(PACKAGE + '.')}.{function.__name__}:"
    yield comment(inspect.getsource(function))
    for name, value in bound.items():
        if not name.isdigit() and isinstance(value, str):
            yield f"{name} = {value!r}"
        if isinstance(value, dict):
            yield f"given = {pformat(value, width=WIDTH, sort_dicts=False)}"


def numbers(check: str, case) -> Iterator[str]:
    facts = {
        "names": ["parameters"],
        "keys": ["keys", "frozen"],
        "count": ["count"],
        "save": ["keys"],
        "lifecycle": ["second"],
    }
    for field in facts.get(check, ()):
        yield f"\n# {'live name -> is it trainable' if field == 'parameters' else field}"
        yield f"expected_{field} = {pformat(case.data[field], width=WIDTH, sort_dicts=False)}"
    if case.data.get("live"):
        yield "\n# The adapter's tensors go by their live names: what a checkpoint holds is computed from them."
    for part in ("base", "adapter", "input", *COMPARED.get(check, ())):
        if tensors := case.tensors(part):
            if part == "trace":
                tensors = {f"{i}: {step}": tensors[str(i)] for i, step in enumerate(case.data["trace"])}
            yield f"\n# {MEANING[part]}"
            yield (
                f"{SAID.get(part, part)} = {{\n"
                + "".join(f"    {json.dumps(k)}: {literal(v)},\n" for k, v in tensors.items())
                + "}"
            )


SAID = {"base": "weights", "input": "inputs", "grad": "gradients"}
MEANING = {
    "base": "The base model's weights",
    "adapter": "The adapter's tensors",
    "input": "The model's inputs",
    "out": "Expected: the output with the adapter",
    "plain": "Expected: the output without it",
    "merged": "Expected: the base weights that merging changes, as they are then",
    "cotangent": "c, and the gradients of sum(c * output)",
    "grad": "Expected: the gradients",
    "saved": "Expected: what a checkpoint holds",
    "fresh": "Expected: tensors of a new adapter",
    "second": "The second adapter's tensors",
    "trace": "Expected: the output after each step",
    "paper": "Expected, or: the output by the formula",
    "paper_grad": "Expected, or: the gradients by the formula",
    "paper_merged": "Expected, or: the merged weights by the formula",
}


def literal(a, indent: int = 4) -> str:
    """An array as nested lists, the last axis on one line; every value exactly."""
    a = np.asarray(a)
    if a.ndim < 2:
        return repr(a.tolist())
    inside = ",\n".join(" " * (indent + 4) + literal(row, indent + 4) for row in a)
    return f"[  # {' x '.join(map(str, a.shape))}\n{inside},\n{' ' * indent}]"


def drawn(method: Method) -> Iterator[str]:
    """What a check that is no recorded case works on."""
    yield "\n# Configs are drawn from these values, on these base models:"
    yield f"draw = {pformat(method.laws.draw, width=WIDTH, sort_dicts=False)}"
    yield f"bases = {list(method.laws.bases)!r}"
    yield f"examples = {laws.EXAMPLES!r}  # of each law, by profile"
