"""The suite's folders stand on each other, and no imports go in a circle, those inside functions included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[1]
LAYERS = ("models", "reference", "driver", "drivers", "run", "record")  # each may import those before it
FILES = [p for p in SUITE.rglob("*.py") if p.relative_to(SUITE).parts[0] not in ("tests", "examples", "fixtures")]


def name_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(root: Path, files) -> dict[str, set[str]]:
    """module -> the package's own modules that it imports."""
    found: dict[str, set[str]] = {name_of(p, root): set() for p in files}
    for path in files:
        name = name_of(path, root)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                stem = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
                source = ".".join(filter(None, [stem, node.module]))
                named = [f"{source}.{a.name}" if f"{source}.{a.name}" in found else source for a in node.names]
            else:
                continue
            own = {other for other in named if other.partition(".")[0] == root.name}
            assert own <= found.keys(), f"{name} imports {own - found.keys()}, which is not there"
            found[name] |= own - {name}
    return found


def layer(module: str) -> int:
    """The number of the layer that a module belongs to; the commands on top of all are in none."""
    _, _, rest = module.partition(".")
    first = rest.split(".")[0]
    return LAYERS.index(first) if first in LAYERS else len(LAYERS)


def test_no_circles():
    TopologicalSorter(imports(SUITE, FILES)).prepare()


def test_arrows_run_one_way():
    up = [f"{a} imports {b}" for a, others in imports(SUITE, FILES).items() for b in others if layer(b) > layer(a)]
    assert not up


def test_every_layer_is_there():
    assert {layer(name) for name in imports(SUITE, FILES)} == {*range(len(LAYERS) + 1)}


@pytest.mark.parametrize(
    "text", ["from . import b", "def f():\n    from .b import x", "import pack.b", "from pack import b"])
def test_circles_are_seen(tmp_path, text):
    root = tmp_path / "pack"
    root.mkdir()
    for name, written in {"__init__": "", "a": text, "b": "from .a import y"}.items():
        (root / f"{name}.py").write_text(written)
    found = imports(root, sorted(root.glob("*.py")))
    assert found == {"pack": set(), "pack.a": {"pack.b"}, "pack.b": {"pack.a"}}
