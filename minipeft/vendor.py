"""Write a package of some methods and exactly what they need, to be kept in another project.

    python -m minipeft.vendor lora dora path/to/peft_lite            write it
    python -m minipeft.vendor lora path/to/x --with peft-model       PeftModel and the classes of tasks as well
    python -m minipeft.vendor lora dora --list                       show the files and their lines, write nothing
    python -m minipeft.vendor --check path/to/peft_lite              which of its files were changed since
    python -m minipeft.vendor --update path/to/peft_lite [--force]   bring it to this release

The package works under any name and in any place, without minipeft. Its functions are those of `core/api.py`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

from . import __version__, methods
from .core import api, errors, registry
from .core.errors import PeftError, nearest

SOURCE = Path(__file__).parent
RECORD = "VENDORED.md"
WITH = ("peft-model", "prompts")
FACTORY = {  # what the package offers beside, with PeftModel
    "model.checkpoint": "get_peft_model_state_dict set_peft_model_state_dict",
    "model.factory": "get_peft_model inject_adapter_in_model",
    "model.mixed": "PeftMixedModel",
    "model.status": "get_layer_status get_model_status",
    "model.tasks": (
        "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification"
    ),
}


class VendorError(PeftError):
    """A vendored package cannot be written, or is not what it was."""


# ------------------------------------------------------------------------------------------------- what can be chosen
def choices() -> dict[str, str]:
    """Name on the command line -> module, below the package: methods, variants of methods and ways to start."""
    found = {peft_type.lower(): _below(module) for peft_type, module in registry.FILES.items()}
    for modules in (*registry.VARIANTS.values(), *registry.STARTS.values()):
        found |= {module.rpartition(".")[2]: _below(module) for module in modules.values()}
    return found | {"eva": "methods.lora.eva"}


def chosen(names: Iterable[str], with_: Iterable[str]) -> dict[str, str]:
    """The modules for names; with a variant comes its method. Raises `VendorError` for a name that is none."""
    known, found = choices(), {}
    for name in [*names, *(["prompts"] if "prompts" in with_ else [])]:
        prompts = [n for n, module in known.items() if module.startswith("methods.prompts.")]
        for one in prompts if name == "prompts" else [name]:
            if one not in known:
                raise VendorError(f"{one!r} is no method.{nearest(one, known)} They are {', '.join(sorted(known))}.")
            folder = known[one].split(".")[1]
            for own in [folder, one] if folder in known else [one]:
                found[own] = known[own]
    if not found:
        raise VendorError(f"No method is named. They are {', '.join(sorted(known))}.")
    if "peft-model" in with_:
        found.setdefault("trainable_tokens", known["trainable_tokens"])  # a field of other methods asks for it
    return found


# -------------------------------------------------------------------------------------------------------- what it needs
def imports(module: str) -> set[str]:
    """The modules that a module of this package imports, inside of functions too, by names below the package."""
    tree, path = ast.parse(_file(module).read_text(encoding="utf-8")), module.split(".")
    if _file(module).name != "__init__.py":
        path.pop()
    typing_only = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inside in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
            home = ".".join([*path[: len(path) - node.level + 1], *([node.module] if node.module else [])])
            found |= {f"{home}.{a.name}" if _exists(f"{home}.{a.name}") else home for a in node.names}
    return found


def needed(modules: Iterable[str]) -> list[str]:
    """These modules, and all that they import, one by way of the other."""
    seen: set[str] = set()
    ahead = list(modules)
    while ahead:
        if (module := ahead.pop()) not in seen:
            seen.add(module)
            ahead += imports(module)
    return sorted(seen)


def _below(module: str) -> str:
    return module.removeprefix(f"{__package__}.")


def _exists(module: str) -> bool:
    return _file(module).is_file()


def _file(module: str) -> Path:
    path = SOURCE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


# ------------------------------------------------------------------------------------------------------ what is written
def package(names: Iterable[str], with_: Iterable[str] = ()) -> dict[str, bytes]:
    """The content of each file of the package by its path, but for the record."""
    found = chosen(names, with_)
    whole = "peft-model" in with_ or "model.peft_model" in needed(found.values())
    models = {
        kind: _below(module)
        for kind, module in registry.MODELS.items()
        if whole and _below(registry.FILES[kind]) in found.values()
    }
    modules = needed({"core.api", *found.values(), *models.values(), *(FACTORY if whole else ())})
    files: dict[str, bytes] = {}
    for module in modules:
        path = _file(module)
        for folder in path.relative_to(SOURCE).parents:
            if folder != Path() and folder != Path("methods"):
                files[f"{folder.as_posix()}/__init__.py"] = (SOURCE / folder / "__init__.py").read_bytes()
        files[path.relative_to(SOURCE).as_posix()] = path.read_bytes()
    files["methods/__init__.py"] = _methods(found, models).encode()
    files["__init__.py"] = _root(found, whole).encode()
    files["py.typed"] = b""
    files["LICENSE"] = licence()
    return dict(sorted(files.items()))


def _methods(found: dict[str, str], models: dict[str, str]) -> str:
    """The text of `methods/__init__.py`: it imports the methods, and says which of their parts are there."""
    lines = ['"""The methods of this copy."""', "", "from ..core import registry"]
    for module in sorted({*found.values()}):
        head, _, last = module.removeprefix("methods").rpartition(".")
        lines.append(f"from {head or '.'} import {last} as {_alias(module)}")
    lines.append("")
    for title, table in (("VARIANTS", registry.VARIANTS), ("STARTS", registry.STARTS)):
        for kind in [kind for kind in table if _below(registry.FILES[kind]) in found.values()]:
            lines.append(f'registry.{title}["{kind}"] = {{')
            for field, module in table[kind].items():
                there = f"{_alias(_below(module))}.__name__," if _below(module) in found.values() else '"",  # not here'
                lines.append(f'    "{field}": {there}')
            lines.append("}")
    lines += [f'registry.MODELS["{kind}"] = __name__ + "{m.removeprefix("methods")}"' for kind, m in models.items()]
    if "trainable_tokens" in found:
        lines += [f'registry.BESIDE["{field}"] = "{kind}"' for field, kind in methods.BESIDE.items()]
    return "\n".join(lines).rstrip() + "\n"


def _alias(module: str) -> str:
    return module.removeprefix("methods.").replace(".", "_")


def _root(found: dict[str, str], whole: bool) -> str:
    """The text of the package's own `__init__.py`: what it offers."""
    offers: dict[str, list[str]] = {"methods": []}
    for name, module in methods.NAMES.items():
        if module in found.values() and not name.endswith("Model"):
            offers.setdefault(module, []).append(name)
    if "methods.lora.lora" in found.values():
        offers["methods.lora.configs"] = methods.FURTHER["lora.configs"].split()
    further = {name for names in (FACTORY.values() if whole else ()) for name in names.split()}
    offers["core.api"] = [name for name in _public(api) if name not in further]
    offers["core.config"] = ["PeftConfig", "PeftType", "TaskType", "get_peft_config"]
    offers["core.errors"] = _public(errors, (PeftError, Warning))
    for module, names in (FACTORY if whole else {}).items():
        offers[module] = names.split()
    lines = [f'"""Methods of minipeft {__version__}: {", ".join(sorted(found))}. See {RECORD}."""', ""]
    lines.append("from . import methods  # noqa: F401")
    for module, given in sorted(offers.items()):
        if given:
            lines += [f"from .{module} import (", *(f"    {name}," for name in sorted(given)), ")"]
    lines += ["", f'__version__ = "{__version__}"', "", "__all__ = ["]
    lines += [f'    "{name}",' for name in sorted({name for names in offers.values() for name in names})]
    return "\n".join([*lines, "]", ""])


def _public(module: ModuleType, kinds: tuple[type, ...] = ()) -> list[str]:
    """The public functions of a module, or its classes of certain kinds."""
    own = [(k, v) for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and k[0] != "_"]
    return [k for k, v in own if (issubclass(v, kinds) if isinstance(v, type) else not kinds and callable(v))]


def licence() -> bytes:
    """The text of minipeft's licence, from the repository or the installed distribution."""
    if (path := SOURCE.parent / "LICENSE").is_file():
        return path.read_bytes()
    for file in metadata.files("minipeft") or ():
        if file.name == "LICENSE":
            return file.read_binary()
    raise VendorError("The licence of minipeft is not to be found, and no copy may go without it.")


def commit() -> str | None:
    """The commit that last changed this package, where it is kept in a repository."""
    command = ["git", "-C", str(SOURCE), "log", "-1", "--format=%H", "--", "."]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def record(names: Iterable[str], with_: Iterable[str], files: dict[str, bytes]) -> str:
    """The text of VENDORED.md, which `--check` and `--update` read."""
    words = " ".join([*names, *(f"--with {extra}" for extra in with_)])
    rows = [f"| `{path}` | {hashlib.sha256(data).hexdigest()} |" for path, data in files.items()]
    return f"""# Vendored from minipeft

- release: {__version__}
- commit: {commit() or "that of the release"}
- methods: {words}

Written by `python -m minipeft.vendor`. With minipeft installed, `python -m minipeft.vendor --check FOLDER` says which
of these files were changed since, and `--update FOLDER` brings in the release that is installed.

| file | sha256 |
| --- | --- |
""" + "\n".join([*rows, ""])


# --------------------------------------------------------------------------------------------------- writing, checking
def write(names: list[str], dest: Path, with_: list[str]) -> dict[str, bytes]:
    """Write a package into a folder that is new or empty. Raises `VendorError`, with nothing written, otherwise."""
    if not dest.name.isidentifier():
        raise VendorError(f"{dest.name!r} cannot be the name of a package: use letters, digits and '_'.")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        there = "is a copy already: use --update" if (dest / RECORD).is_file() else "exists, and is no such copy"
        raise VendorError(f"'{dest}' {there}. Nothing was written.")
    files = package(names, with_)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as scratch:
        built = Path(scratch, dest.name)
        _put(built, {**files, RECORD: record(names, with_, files).encode()})
        if dest.exists():
            dest.rmdir()
        built.rename(dest)
    return files


def _put(folder: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def recorded(dest: Path) -> tuple[list[str], list[str], dict[str, str]]:
    """(methods, what comes with them, hash by file) of a vendored package. Raises `VendorError` where there is none."""
    path = dest / RECORD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    words = re.search(r"^- methods: (.*)$", text, re.M)
    if words is None:
        raise VendorError(f"'{dest}' is no package that minipeft.vendor wrote: it has no {RECORD} that says so.")
    with_ = re.findall(r"--with (\S+)", words[1])
    names = re.sub(r"--with \S+", "", words[1]).split()
    return names, with_, dict(re.findall(r"^\| `(.+?)` \| ([0-9a-f]{64}) \|$", text, re.M))


def changed(dest: Path) -> list[str]:
    """The files of a vendored package that are not as they were written; those that are gone among them."""
    _, _, hashes = recorded(dest)
    now = lambda path: hashlib.sha256((dest / path).read_bytes()).hexdigest() if (dest / path).is_file() else None
    return [path for path, was in hashes.items() if now(path) != was]


def update(dest: Path, force: bool = False) -> dict[str, bytes]:
    """Bring a vendored package to this release. Raises `VendorError`, unless `force`, when files of it were changed."""
    names, with_, hashes = recorded(dest)
    if (edited := changed(dest)) and not force:
        raise VendorError(
            f"Changed since they were written: {', '.join(edited)}. Nothing was updated; --force overwrites them."
        )
    files = package(names, with_)
    if taken := [path for path in files if path not in hashes and (dest / path).exists()]:
        raise VendorError(f"In the way of new files: {', '.join(taken)}. Nothing was updated.")
    _put(dest, {**files, RECORD: record(names, with_, files).encode()})
    for path in hashes.keys() - files.keys():
        (dest / path).unlink(missing_ok=True)
    for folder in sorted((p for p in dest.rglob("*") if p.is_dir()), reverse=True):
        if folder.name == "__pycache__" or not any(folder.iterdir()):
            shutil.rmtree(folder)
    return files


def listing(files: dict[str, bytes]) -> Iterator[str]:
    """Lines that show what a package consists of."""
    code = {path: data.count(b"\n") for path, data in files.items() if path.endswith(".py")}
    yield from (f"{lines:6}  {path}" for path, lines in code.items())
    yield f"{sum(code.values()):6}  lines in {len(code)} files"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m minipeft.vendor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", metavar="METHOD ... DEST", help="methods, and in the end the new folder")
    parser.add_argument("--with", dest="with_", action="append", choices=WITH, default=[], help="what comes with them")
    parser.add_argument("--list", action="store_true", help="show the files and their lines, and write nothing")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", type=Path, metavar="DEST", help="say which files of a package were changed")
    how.add_argument("--update", type=Path, metavar="DEST", help="bring a package to this release")
    parser.add_argument("--force", action="store_true", help="with --update: overwrite changed files")
    given = parser.parse_args(arguments)
    try:
        if given.check is not None:
            edited = changed(given.check)
            print("\n".join(f"changed: {path}" for path in edited) or f"{given.check} is as it was written.")
            return int(bool(edited))
        if given.update is not None:
            files = update(given.update, given.force)
        elif given.list:
            known = choices()
            names = given.words[:-1] if given.words and given.words[-1] not in known else given.words
            files = package(names, given.with_)
        elif len(given.words) < 2:
            parser.error("name one or more methods, and then the folder of the new package")
        else:
            files = write(given.words[:-1], Path(given.words[-1]).absolute(), given.with_)
    except VendorError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("\n".join(listing(files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
