"""What calls what: the functions of minipeft that one call goes through, with the shapes that they see."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import minipeft
from minipeft.core.bases import Base
from minipeft.core.plan import Plan

from . import html, source
from .blocks import Html

MINIPEFT = str(source.ROOT / "minipeft")
LEFT_OUT = ("<", "__setattr__", "__getattr__", "__init_subclass__", "__delattr__")  # comprehensions, and the plumbing


@dataclass
class Call:
    name: str  # with its class
    file: str
    line: int
    depth: int  # among the calls that are kept
    given: str = ""
    gives: str = ""
    times: int = 1


def sees_tensors(name: str, values: dict[str, Any]) -> bool:
    """Whether a call has to do with the numbers: a layer, adapter or model that is given a tensor."""
    given = [v for value in values.values() for v in (value if isinstance(value, tuple) else (value,))]
    return isinstance(values.get("self"), (nn.Module, Base)) and any(isinstance(v, Tensor) for v in given)


def sees_modules(name: str, values: dict[str, Any]) -> bool:
    """Whether a call has to do with changing a model: it is given a module or a frozen layer, or asks the method."""
    own = values.get("self", values.get("cls"))
    given = [value for key, value in values.items() if key not in ("self", "cls")]
    steps = isinstance(own, Plan) and not name.startswith("_")
    hooks = ("prepare", "share", "build", "complete", "check_layer")
    known = own is not None or name in minipeft.__all__
    return steps or (known and any(isinstance(value, (nn.Module, Base)) for value in given)) or name in hooks


def followed(run: Callable[[], Any], keep: Callable[[str, dict[str, Any]], bool], deepest: int = 99) -> list[Call]:
    """The calls of minipeft's functions that `run` makes and `keep` wants, in turn; the same one again is counted."""
    calls: list[Call] = []
    stack: list[tuple[Any, Call | None]] = []

    def depth() -> int:
        return sum(call is not None for _, call in stack)

    def hook(frame: Any, event: str, value: Any) -> None:
        code = frame.f_code
        if event == "call":
            kept = code.co_filename.startswith(MINIPEFT) and not code.co_name.startswith(LEFT_OUT)
            given = {name: frame.f_locals.get(name) for name in parameters(code)}
            if not kept or depth() >= deepest or not keep(code.co_name, given):
                stack.append((frame, None))
                return
            call = Call(name_of(frame), code.co_filename, code.co_firstlineno, depth(), arguments(frame))
            calls.append(call)
            stack.append((frame, call))
        elif event == "return" and stack and stack[-1][0] is frame:
            ended = stack.pop()[1]
            if ended:
                ended.gives = described(value)

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        run()
    finally:
        sys.setprofile(before)
    return counted(calls)


def name_of(frame: Any) -> str:
    """The function's name after its class: that of the object where it is one of minipeft's, which says more."""
    own = frame.f_locals.get("self", frame.f_locals.get("cls"))
    name = frame.f_code.co_name
    if own is None:
        return str(name)
    cls = own if isinstance(own, type) else type(own)
    return f"{cls.__name__}.{name}"


def arguments(frame: Any) -> str:
    """The tensors, names and modules among the arguments."""
    names = [name for name in parameters(frame.f_code) if name not in ("self", "cls")]
    shown = [(name, described(frame.f_locals.get(name))) for name in names]
    return ", ".join(f"{name} {value}" for name, value in shown if value)


def parameters(code: Any) -> tuple[str, ...]:
    flags = bool(code.co_flags & 4) + bool(code.co_flags & 8)  # *args and **kwargs
    return tuple(code.co_varnames[:code.co_argcount + code.co_kwonlyargcount + flags])


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"({', '.join(map(str, value.shape))})"
    if isinstance(value, str) and 0 < len(value) < 24:
        return f"'{value}'"
    if isinstance(value, nn.Module) or type(value).__module__.startswith("minipeft"):
        return type(value).__name__
    if isinstance(value, dict):
        return ", ".join(f"{k} {described(v)}" for k, v in value.items() if isinstance(v, Tensor))
    if isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
        return ", ".join(map(described, value))
    return ""


def counted(calls: list[Call]) -> list[Call]:
    """The calls, runs of one function at one depth as one."""
    found: list[Call] = []
    for call in calls:
        if found and (found[-1].name, found[-1].depth, found[-1].line) == (call.name, call.depth, call.line):
            found[-1].times += 1
        else:
            found.append(call)
    return found


def drawn(calls: list[Call], what: str) -> Html:
    """The calls as a sequence between the files that they are in, each a link to its line."""
    files = list(dict.fromkeys(call.file for call in calls))
    names = [Path(file).relative_to(source.ROOT / "minipeft").as_posix() for file in files]
    column, row, left, top = 118, 27, 84, 44
    width, height = left + column * len(files) + 200, top + row * len(calls) + 16
    parts = [f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="{html.escape(what)}" class="sequence" '
             f'style="min-width:{width * 0.75:.0f}px">']
    head = "head-" + re.sub(r"\W+", "-", what)
    x = {file: left + column * n for n, file in enumerate(files)}
    for file, name in zip(files, names):
        parts.append(f'<line x1="{x[file]}" y1="{top - 12}" x2="{x[file]}" y2="{height - 8}" class="life"/>'
                     f'<text x="{x[file]}" y="18" text-anchor="middle" class="file">{html.escape(name)}</text>')
    callers: list[Call] = []
    for number, call in enumerate(calls):
        y = top + row * number + 8
        del callers[call.depth:]
        start = x[callers[-1].file] if callers else 12
        end = x[call.file]
        same = start == end
        line = (f"M{start} {y - 7}h14v10h-8" if same else f"M{start} {y}H{end + (-6 if end > start else 6)}")
        place = max(start, end) + (20 if same else 8)
        address = f"{source.page_of(Path(call.file))}#L{call.line}"
        times = f" × {call.times}" if call.times > 1 else ""
        gives = f" → {call.gives}" if call.gives else ""
        parts.append(f'<path d="{line}" class="arrow" marker-end="url(#{head})"/><a href="{address}">'
                     f'<text x="{place}" y="{y + 4}"><tspan class="call">{html.escape(call.name)}</tspan>'
                     f'<tspan class="seen"> {html.escape(call.given)}{html.escape(gives)}{times}</tspan></text></a>')
        callers.append(call)
    parts.append(f'<defs><marker id="{head}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
                 'orient="auto"><path d="M0 0L8 4L0 8z" class="tip"/></marker></defs></svg>')
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(what)}">'
    return Html(box + "".join(parts) + "</div>")
