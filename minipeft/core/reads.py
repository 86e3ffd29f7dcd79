"""Which layers a model reads instead of calling them, as `F.linear(x, self.qkv.weight)`: adapters would be passed over.

The code of the modules above a layer tells: what their `forward` takes the `weight` of.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from .walk import Wrapper, wrapped_in

Read = tuple[bool, tuple[str, ...]]  # whether from `self`, and by which attributes: (True, ("attn", "qkv"))
DESCRIBES = frozenset("device dim dtype is_cuda is_meta itemsize layout ndim numel requires_grad shape size".split())
WRITES = frozenset("data grad".split())  # and all that ends with "_"
ASKS = frozenset("getattr hasattr id isinstance type".split())
BETWEEN = frozenset("CACHE EXTENDED_ARG NOP PUSH_NULL".split())


def is_read(model: nn.Module, live: str) -> bool:
    """Whether a module above the one at the path `live` computes with its `weight` itself."""
    *parents, last = live.split(".")
    above: Any = model
    ways: list[tuple[set[Read], list[str]]] = []  # for each module above: what it reads, and the path from it
    for part in [*parents, last]:
        ways.append((_reads(above), []))
        if not isinstance(above, Wrapper) and wrapped_in(above) is None:
            for _, path in ways:
                path.append(part)
        above = above._modules[part]
    return any(tuple(path if own else path[-len(names) :]) == names for reads, path in ways for own, names in reads)


def _reads(module: nn.Module) -> Any:
    kind: Any = type(module)
    forward = inspect.unwrap(module.forward)
    return _reads_of(kind, getattr(forward, "__code__", None))


@functools.lru_cache(maxsize=1024)
def _reads_of(cls: type, forward: CodeType | None) -> set[Read]:
    """What code of a class's `forward` reads, with the methods that it calls."""
    found: set[Read] = set()
    waiting, seen = [forward], {forward}
    while waiting:
        for code in _nested(waiting.pop()):
            found.update(_read_in(code))
            for name in code.co_names:
                method = inspect.getattr_static(cls, name, None)
                own = inspect.unwrap(method).__code__ if inspect.isfunction(method) else None
                if own not in seen:
                    seen.add(own)
                    waiting.append(own)
    return found


def _nested(code: CodeType | None) -> Iterator[CodeType]:
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _nested(constant)


def _read_in(code: CodeType) -> Iterator[Read]:
    """Where code takes the `weight` of something, and does more than to ask what it is or to write to it."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in BETWEEN]
    for at, step in enumerate(steps):
        if not (_takes(step) and step.argval == "weight"):
            continue
        first = at
        while first and _takes(steps[first - 1]):
            first -= 1
        then = steps[at + 1].argval if at + 1 < len(steps) and _takes(steps[at + 1]) else ""
        described = then in DESCRIBES or then in WRITES or then.endswith("_")
        asked = first > 1 and steps[first - 2].argval in ASKS
        if first < at and first and not (described or asked):
            yield steps[first - 1].argval == "self", tuple(step.argval for step in steps[first:at])


def _takes(step: Any) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")
