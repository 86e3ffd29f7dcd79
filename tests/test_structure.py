"""How minipeft's folders lean on each other: one way, without circles."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minipeft"
ORDER = ["core", "maths", "model", "methods", "compat"]  # each imports itself and what stands before it
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@cache
def imports(module):
    """The modules of the package that a module imports, inside of functions too, but not for type checkers alone."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    unseen = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inside in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in unseen:
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{home}.{a.name}" if f"{home}.{a.name}" in FILES else home for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found & FILES.keys() - {module}


def folder(module):
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_no_module_imports_itself_by_a_detour(module):
    seen, ahead = set(), list(imports(module))
    while ahead:
        if (at := ahead.pop()) not in seen:
            seen.add(at)
            ahead += imports(at)
    assert module not in seen


@pytest.mark.parametrize("module", [module for module in FILES if folder(module) in ORDER])
def test_folders_import_only_what_stands_before_them(module):
    allowed = {"", *ORDER[: ORDER.index(folder(module)) + 1]}
    wrong = {other for other in imports(module) if folder(other) not in allowed or other == "minipeft"}
    assert not wrong


def test_the_test_sees_imports():
    assert "minipeft.core.errors" in imports("minipeft.core.config")
    assert "minipeft.model.prompt" in imports("minipeft.model.peft_model")


def test_files_that_are_named_exist():
    """Docstrings and comments send a reader to other files, by names that they have."""
    root = PACKAGE.parent
    known = {path.name for part in (PACKAGE, root / "conformance") for path in part.rglob("*.py")} | {"script.py"}
    named = {
        (module, name)
        for module, path in FILES.items()
        for name in re.findall(r"\w+\.py\b", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert not [(module, name) for module, name in named if name not in known]
