"""Write minipeft/__init__.pyi, which tells type checkers and editors of the names that are imported lazily.

python tools/stub.py [--check]
"""

import sys
import textwrap
from pathlib import Path

import minipeft

STUB = Path(minipeft.__file__).with_suffix(".pyi")


def stub() -> str:
    """The text of the stub: each name imported as itself, by module, and `__all__`."""
    modules: dict[str, list[str]] = {}
    for name, module in sorted(minipeft.WHERE.items()):
        modules.setdefault(module, []).append(name)
    lines = ["# What type checkers and editors see of this package. Written by tools/stub.py."]
    for module, names in sorted(modules.items()):
        lines += [f"from .{module} import (", *(f"    {name} as {name}," for name in names), ")"]
    listed = textwrap.fill(", ".join(f'"{name}"' for name in minipeft.__all__), 116, initial_indent="    ",
                           subsequent_indent="    ")  # fmt: skip
    return "\n".join([*lines, "", "__version__: str", "# fmt: off", "__all__ = [", f"{listed},", "]", "# fmt: on", ""])


if __name__ == "__main__":
    if "--check" not in sys.argv:
        STUB.write_text(stub(), encoding="utf-8")
    elif STUB.read_text(encoding="utf-8") != stub():
        sys.exit(f"{STUB} is not what tools/stub.py writes; run it")
