"""Presents another package (``minipeft``) under the name ``peft``.

As a pytest plugin (``-p peft_shim``), or through ``install()``, it puts an import hook in front of every
other finder: ``peft`` and each dotted module that the real package has become thin stand-in modules, and
every name asked of one is looked up in the target package, each time it is asked:

0. what the target's own ``compat.offered()`` says stands at that dotted path, where it has one,
1. the target module with the same dotted path (``peft.tuners.lora.layer`` -> ``minipeft.tuners.lora.layer``),
2. any other module of the target that binds the name; where several bind different objects, the one whose
   dotted path shares most with the path asked for (``minipeft.methods.lora`` for ``peft.tuners.lora.layer``),
3. for ``peft.import_utils.is_*`` and ``infer_device``, which only describe the machine: a check written here,
4. a placeholder, when the real package has the name: it can be imported, compared, put into parametrize
   lists and (while tests are collected) called, but using it in a running test raises MissingPeftName.

Names that the real module does not have either raise AttributeError.  Assigning a name on a stand-in
module (mock.patch, monkeypatch) assigns it in the target's modules which bind the same object.

Which modules and names the real package has is read from an index made from its source text
(``python peft_shim.py --index SRC_DIR --out FILE``); nothing of the target's inside needs to be listed.

Environment: PEER_TARGET (target's import name, default ``minipeft``), PEER_INDEX (the index file),
PEER_ALIASES (optional JSON file {"peft.dotted.name": "target.module:attribute"} for names that the target
offers under another name), PEER_MISSING (a file to which the names that were asked for and are absent, and the
target's modules that failed to import, are appended).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import re
import sys
import types
from pathlib import Path

try:
    import pytest
except ImportError:  # only the index is made
    pytest = None

PKG = "peft"
GENERIC = {"tuners", "utils", "layer", "layers", "model", "config", "optimizers", "other", "helpers", "peft_model"}


class MissingPeftName(Exception):
    """A test used a name that the target package does not offer."""


# --------------------------------------------------------------------------------------------------
# the index: which modules and names does the real package have?
# --------------------------------------------------------------------------------------------------


def _bound_names(tree: ast.Module) -> dict:
    """Top-level names of a module -> 'def', 'class', 'value', 'own' (from the package) or 'ext' (from elsewhere)."""
    names = {}

    def visit(body):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names[node.name] = "def"
            elif isinstance(node, ast.ClassDef):
                names[node.name] = "class"
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    for sub in ast.walk(target):
                        if isinstance(sub, ast.Name) and isinstance(sub.ctx, ast.Store):
                            names[sub.id] = "value"
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names[node.target.id] = "value"
            elif isinstance(node, ast.ImportFrom):
                own = node.level > 0 or (node.module or "").split(".")[0] == PKG
                for alias in node.names:
                    names[alias.asname or alias.name] = "own" if own else "ext"
                    if not own:
                        external[alias.asname or alias.name] = f"{node.module}:{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    names.setdefault(alias.asname or alias.name.split(".")[0], "ext")
                    external[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    ) + ":"
            for field in ("body", "orelse", "finalbody"):
                if isinstance(node, (ast.If, ast.Try, ast.With)):
                    visit(getattr(node, field, []))
            if isinstance(node, ast.Try):
                for handler in node.handlers:
                    visit(handler.body)
            if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
                for sub in ast.walk(node):  # lazily offered names: if name == "X"
                    if isinstance(sub, ast.Compare) and isinstance(sub.ops[0], ast.Eq):
                        for c in sub.comparators:
                            if isinstance(c, ast.Constant) and isinstance(c.value, str):
                                names.setdefault(c.value, "own")

    external: dict = {}
    visit(tree.body)
    return {"names": names, "external": external}


def make_index(src: str | os.PathLike) -> dict:
    """Index of the package in ``src`` (the folder that holds its ``__init__.py``)."""
    src = Path(src)
    modules = {}
    for path in sorted(src.rglob("*.py")):
        parts = [PKG, *path.relative_to(src).with_suffix("").parts]
        package = parts[-1] == "__init__"
        if package:
            parts.pop()
        info = _bound_names(ast.parse(path.read_text(encoding="utf-8")))
        modules[".".join(parts)] = {"package": package, **info}
    version = None
    match = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", (src / "__init__.py").read_text(encoding="utf-8"), re.M)
    if match:
        version = match.group(1)
    public = []
    for node in ast.parse((src / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            public = list(ast.literal_eval(node.value))
    return {"version": version, "modules": modules, "all": public}


# --------------------------------------------------------------------------------------------------
# placeholders
# --------------------------------------------------------------------------------------------------

_collecting = True


def _use(what):
    raise MissingPeftName(f"{what} is not offered by {Target.name}")


class _MissingValue:
    """What a placeholder gives back while tests are collected."""

    def __init__(self, path):
        object.__setattr__(self, "_peer_path", path)

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if _collecting:
            return _MissingValue(f"{self._peer_path}.{name}")
        _use(self._peer_path)

    def __call__(self, *args, **kwargs):
        if not _collecting:
            _use(self._peer_path)
        if len(args) == 1 and not kwargs and isinstance(args[0], (types.FunctionType, type)):
            return args[0]  # used as a decorator
        kind = type(self._peer_path.rpartition(".")[2], (_MissingValue,), {})  # test ids show the class's name
        return kind(f"{self._peer_path}()")

    def _operate(self, *args):
        if not _collecting:
            _use(self._peer_path)
        return _MissingValue(self._peer_path)

    __add__ = __radd__ = __or__ = __ror__ = __getitem__ = __sub__ = __and__ = _operate

    def __iter__(self):
        if not _collecting:
            _use(self._peer_path)
        return iter(())

    def __contains__(self, item):
        if not _collecting:
            _use(self._peer_path)
        return False

    def __len__(self):
        if not _collecting:
            _use(self._peer_path)
        return 0

    def __bool__(self):
        if not _collecting:
            _use(self._peer_path)
        return False

    def __setattr__(self, name, value):
        if not _collecting:
            _use(self._peer_path)


class _MissingMeta(type):
    def __call__(cls, *args, **kwargs):
        if "_peer_path" not in cls.__dict__:  # a subclass that a test file defines
            if _collecting:
                return _MissingValue(cls.__name__)
            _use(cls._peer_path)
        return _MissingValue(cls._peer_path)(*args, **kwargs)

    def __getattr__(cls, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return getattr(_MissingValue(cls._peer_path), name)

    def __instancecheck__(cls, obj):
        if _collecting:
            return False
        _use(cls._peer_path)

    def __subclasscheck__(cls, sub):
        if _collecting or sub is cls:
            return sub is cls
        _use(cls._peer_path)

    def __iter__(cls):
        return iter(_MissingValue(cls._peer_path))

    def __getitem__(cls, key):
        return _MissingValue(cls._peer_path)[key]

    def __contains__(cls, key):
        return key in _MissingValue(cls._peer_path)

    def __len__(cls):
        return len(_MissingValue(cls._peer_path))

    def __or__(cls, other):
        return _MissingValue(cls._peer_path)

    __ror__ = __add__ = __radd__ = __or__


_placeholders: dict = {}
missing_used: set = set()


def _placeholder(module: str, name: str):
    path = f"{module}.{name}"
    if path not in _placeholders:
        _placeholders[path] = _MissingMeta(name, (), {"_peer_path": path, "__module__": module})
    missing_used.add(path)
    return _placeholders[path]


# --------------------------------------------------------------------------------------------------
# the target package
# --------------------------------------------------------------------------------------------------


class _Target:
    def __init__(self):
        self.name = os.environ.get("PEER_TARGET", "minipeft")
        self._modules = None
        self._offered = None
        self.failed = {}
        self.aliases = {}
        self.broken = None

    def top(self):
        try:
            return importlib.import_module(self.name)
        except Exception as exc:
            self.broken = f"{type(exc).__name__}: {exc}"
            raise ImportError(f"{self.name} cannot be imported: {self.broken}") from exc

    def module(self, dotted: str):
        """The target's module of that dotted path, or None."""
        if dotted == self.name:
            return self.top()
        self.top()
        if dotted in sys.modules:
            return sys.modules[dotted]
        try:
            return importlib.import_module(dotted)
        except ModuleNotFoundError as exc:
            if exc.name and (dotted == exc.name or dotted.startswith(exc.name + ".")):
                return None
            self.failed[dotted] = str(exc)
        except Exception as exc:
            self.failed[dotted] = f"{type(exc).__name__}: {exc}"
        return None

    def load_aliases(self):
        path = os.environ.get("PEER_ALIASES")
        if path:
            self.aliases = json.loads(Path(path).read_text())

    def offered(self, module: str):
        """What the target itself says it offers under that dotted path of the real package (its `compat`), or None."""
        if self._offered is None:
            self._offered = {}
            compat = self.module(self.name + ".compat")
            if compat is not None and hasattr(compat, "offered"):
                tables = self.module(self.name + ".defaults")
                for path, names in compat.offered().items():
                    home = self._offered[path] = types.ModuleType(path)
                    vars(home).update(names)
                    if path.startswith("peft.utils") and hasattr(tables, "__getattr__"):
                        vars(home)["__getattr__"] = tables.__getattr__
                self._offered |= {p: self._offered[h] for p, h in compat.same_as().items() if p not in self._offered}
        return self._offered.get(module)

    def modules(self) -> dict:
        """Every importable module of the target: dotted name -> module."""
        if self._modules is None:
            top = self.top()
            found = {self.name: top}
            for info in pkgutil.walk_packages(getattr(top, "__path__", []), self.name + ".", onerror=lambda n: None):
                if info.name.rpartition(".")[2] == "__main__":
                    continue
                try:
                    found[info.name] = importlib.import_module(info.name)
                except Exception as exc:
                    self.failed[info.name] = f"{type(exc).__name__}: {exc}"
            self._modules = found
        return self._modules

    def _own(self, value) -> bool:
        """Is value made by the target (or a plain value, which carries no origin)?"""
        if isinstance(value, types.ModuleType):
            return False
        origin = getattr(value, "__module__", None)
        if isinstance(origin, str) and isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return origin.split(".")[0] in (self.name.split(".")[0], PKG)
        return True

    def candidates(self, name: str):
        return [(dotted, vars(mod)[name]) for dotted, mod in self.modules().items() if name in vars(mod)]

    def find(self, module: str, name: str, kind: str | None):
        """(found, value) for ``name`` asked of the stand-in for ``module``."""
        alias = self.aliases.get(f"{module}.{name}")
        if alias:
            dotted, _, attr = alias.partition(":")
            value = importlib.import_module(dotted)
            for part in filter(None, attr.split(".")):
                value = getattr(value, part)
            return True, value
        offered = self.offered(module)
        if offered is not None:
            value = getattr(offered, name, self)
            if value is not self:
                return True, value
        mapped = self.module(self.name + module[len(PKG) :])
        if mapped is not None:
            value = getattr(mapped, name, self)
            if value is not self and (kind == "ext" or not isinstance(value, types.ModuleType)):
                return True, value
        asked = module.split(".")[1:]
        best, groups = None, []
        for dotted, value in self.candidates(name):
            if isinstance(value, types.ModuleType) or (kind != "ext" and not self._own(value)):
                continue
            parts = dotted.split(".")[1:]
            score = sum((1 if p in GENERIC else 10) for p in set(asked) & set(parts))
            score += sum(5 for p in set(asked) - GENERIC for q in parts if p != q and (p in q or q in p) and len(p) > 2)
            if not parts:
                score += 2  # the top level
            if getattr(value, "__module__", None) == dotted:
                score += 0.5
            for group in groups:
                other = group["value"]
                plain = type(other) is type(value) and isinstance(value, (str, int, float))
                same = other is value or (plain and other == value)
                if same:
                    group["score"] = max(group["score"], score)
                    break
            else:
                groups.append({"value": value, "score": score, "where": dotted})
        groups.sort(key=lambda g: -g["score"])
        if len(groups) == 1:
            best = groups[0]
        elif groups and groups[0]["score"] > groups[1]["score"] and groups[0]["score"] >= 2:
            best = groups[0]
        return (True, best["value"]) if best else (False, None)


Target = _Target()
INDEX: dict = {"version": None, "modules": {}, "all": []}


# --------------------------------------------------------------------------------------------------
# availability checks
# --------------------------------------------------------------------------------------------------

_DISTRIBUTIONS = {"bnb": "bitsandbytes", "te": "transformer_engine", "bnb_4bit": "bitsandbytes", "auto_awq": "awq"}


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _availability(name: str, kind: str):
    """The value for ``peft.import_utils.is_*``, or None when the name is no such check."""
    from packaging.version import parse

    if name == "infer_device":
        import torch

        return lambda: "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"is_([a-z0-9_]+?)_ge_v?(\d+(?:_\d+)*)", name)
    if match:
        lib, wanted = match.group(1), match.group(2).replace("_", ".")
        try:
            result = parse(importlib.metadata.version(lib)) >= parse(wanted)
        except importlib.metadata.PackageNotFoundError:
            result = False
        return result if kind == "value" else (lambda: result)
    match = re.fullmatch(r"is_([a-z0-9_]+?)_available", name)
    if not match:
        return None
    lib = match.group(1)
    if lib == "xpu":
        import torch

        result = hasattr(torch, "xpu") and torch.xpu.is_available()
    else:
        result = _has(_DISTRIBUTIONS.get(lib, lib))
        if result and lib == "bnb_4bit":
            import bitsandbytes

            result = hasattr(bitsandbytes.nn, "Linear4bit")
    result = bool(result)
    return result if kind == "value" else (lambda *args, **kwargs: result)


# --------------------------------------------------------------------------------------------------
# stand-in modules and the import hook
# --------------------------------------------------------------------------------------------------


class StandIn(types.ModuleType):
    def __getattr__(self, name):
        module = types.ModuleType.__getattribute__(self, "__name__")
        patched = types.ModuleType.__getattribute__(self, "__dict__").get("_peer_patched", {})
        if name in patched:
            return patched[name]["value"]
        if name == "__all__" and module == PKG:
            return list(INDEX["all"])
        dunder = name.startswith("__") and name.endswith("__")
        info = INDEX["modules"].get(module, {})
        kind = info.get("names", {}).get(name)
        sub = f"{module}.{name}"
        if sub in INDEX["modules"] and kind in (None, "own"):
            return importlib.import_module(sub)
        if dunder and name != "__version__":
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        found, value = Target.find(module, name, kind)
        if found:
            return value
        if name == "__version__" and kind is not None:
            return INDEX["version"]
        if kind in ("def", "value", "own") and (name.startswith("is_") or name == "infer_device"):
            value = _availability(name, _origin_kind(module, name))
            if value is not None:
                return value
        if kind == "ext" and name in info.get("external", {}):
            dotted, _, attr = info["external"][name].partition(":")
            try:
                value = importlib.import_module(dotted)
                return getattr(value, attr) if attr else value
            except (ImportError, AttributeError):
                pass
        if kind is not None or (module == PKG and name in INDEX["all"]):
            return _placeholder(module, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def __setattr__(self, name, value):
        dunder = name.startswith("__") and name.endswith("__") and name != "__version__"
        if dunder or name.startswith("_peer_") or isinstance(value, StandIn):
            return super().__setattr__(name, value)
        patched = self.__dict__.setdefault("_peer_patched", {})
        try:
            current = getattr(self, name)
        except AttributeError:
            current = self
        entry = patched.get(name)
        if entry is None:
            places = []
            for mod in Target.modules().values():
                held = vars(mod).get(name, self)
                if held is not self and (held is current or (isinstance(held, str) and held == current)):
                    places.append(mod)
            entry = patched[name] = {"places": places, "original": current}
        for mod in entry["places"]:
            setattr(mod, name, value)
        entry["value"] = value
        if value is entry["original"]:
            del patched[name]

    def __delattr__(self, name):
        entry = self.__dict__.get("_peer_patched", {}).pop(name, None)
        if entry is None:
            if name in self.__dict__:
                super().__delattr__(name)
            return  # nothing was assigned (or it is already undone): the name shows through as before
        for mod in entry["places"]:
            setattr(mod, name, entry["original"])

    def __dir__(self):
        module = self.__name__
        names = set(INDEX["modules"].get(module, {}).get("names", {}))
        return sorted(names | set(self.__dict__))


def _origin_kind(module: str, name: str) -> str:
    """'def' or 'value': what kind of thing the real import_utils makes of the name."""
    for dotted in (module, f"{PKG}.import_utils"):
        kind = INDEX["modules"].get(dotted, {}).get("names", {}).get(name)
        if kind in ("def", "value"):
            return kind
    return "def"


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != PKG and not fullname.startswith(PKG + "."):
            return None
        info = INDEX["modules"].get(fullname)
        if info is None:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        spec = importlib.machinery.ModuleSpec(fullname, self, is_package=info["package"], origin="peft_shim")
        return spec

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        return None


def install(index: str | os.PathLike | None = None, target: str | None = None):
    """Put the hook in place; must run before anything imports the real package."""
    index = index or os.environ["PEER_INDEX"]
    INDEX.update(json.loads(Path(index).read_text()))
    if target:
        Target.name = target
    Target.load_aliases()
    loaded = [n for n in sys.modules if n == PKG or n.startswith(PKG + ".")]
    if loaded:
        raise RuntimeError(f"{PKG} is already imported: {loaded[:3]}")
    sys.meta_path.insert(0, Finder())
    original = importlib.metadata.Distribution.from_name.__func__

    def from_name(cls, name):
        # transformers, accelerate and diffusers ask for the installed version of peft
        return _Distribution() if str(name).lower() == PKG else original(cls, name)

    importlib.metadata.Distribution.from_name = classmethod(from_name)


class _Distribution(importlib.metadata.Distribution):
    def read_text(self, filename):
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {PKG}\nVersion: {INDEX['version']}\n"
        return None

    def locate_file(self, path):
        return Path(path)


# --------------------------------------------------------------------------------------------------
# pytest plugin
# --------------------------------------------------------------------------------------------------


def pytest_configure(config):
    global _collecting
    _collecting = True


def pytest_collection_finish(session):
    global _collecting
    _collecting = False
    if Target.broken:
        raise pytest.UsageError(f"peft_shim: {Target.name} cannot be imported: {Target.broken}")


def pytest_sessionfinish(session, exitstatus):
    real = [
        name
        for name, mod in list(sys.modules.items())
        if (name == PKG or name.startswith(PKG + ".")) and not isinstance(mod, StandIn)
    ]
    if real:
        print(f"\npeft_shim: the real package was imported: {real[:5]}", file=sys.stderr)
        session.exitstatus = 70
    report = os.environ.get("PEER_MISSING")
    if report:
        with open(report, "a", encoding="utf-8") as f:
            for path in sorted(missing_used):
                f.write(f"name {path}\n")
            for path, text in sorted(Target.failed.items()):
                f.write(f"module {path}: {text}".replace("\n", " ") + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", required=True, help="folder of the real package's source")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    Path(args.out).write_text(json.dumps(make_index(args.index)))
elif os.environ.get("PEER_INDEX"):
    install()
