"""Regular expressions out of configurations, which may come from anywhere: none of them can run for ever.

Python's `re` tries one way to match after the other, and some expressions have exponentially many of them. Those that
may (a repetition inside another, many repetitions in a row) are matched in another way: by the set of all positions at
which a part of the expression can end. That takes time polynomial in the length of the text, whatever the expression.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

from .errors import ConfigError, shown

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

PLAIN = re.compile(r"[\w.]*")  # names, which are nothing to worry about
LINEAR = re.compile(r"[\w.|\\]*")  # alternatives without any group or repetition
LONGEST = 10**6  # characters of an expression
LONGEST_INTRICATE = 10**4  # of one that `re` is not trusted with
WAYS = 10  # what `ways` counts at most for `re`
REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
UNKNOWN = ("GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP", "POSSESSIVE_REPEAT")  # to the other way of matching
CATEGORIES = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": lambda c: c.isalnum() or c == "_"}


def in_layer_path(key: str) -> str:
    """The expression for whole paths that end with what `key`, of a field such as `rank_pattern`, stands for."""
    return rf"(.*\.)?({key})"


def check_pattern(pattern: str, field: str, key: str | None = None) -> None:
    """Raise `ConfigError` unless `pattern` is a regular expression that can be matched in a reasonable time.

    `key`: how the user wrote it, where that is only a part of it.
    """
    if PLAIN.fullmatch(pattern if key is None else key):
        return
    said = f"`{field}`: {shown(pattern if key is None else key)}"
    if len(pattern) > LONGEST:
        raise ConfigError(f"{said} is too long for a regular expression: {len(pattern)} characters.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
        intricate = is_intricate(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{said} is not a regular expression ({error}).") from None
    if intricate and (len(pattern) > LONGEST_INTRICATE or _holds(parser.parse(pattern), UNKNOWN)):
        why = "repetitions inside repetitions, or too many of them"
        raise ConfigError(f"{said} could take for ever to match: it has {why}. Write it more simply, or list names.")


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` matches the whole of `path`: what `re.fullmatch` says."""
    if not is_intricate(pattern):
        return re.fullmatch(pattern, path) is not None
    tree = parser.parse(pattern)
    return len(path) in _ends(tree, path, {0}, tree.state.flags)


@functools.lru_cache(maxsize=4096)
def is_intricate(pattern: str) -> bool:
    """Whether `re` could take very long."""
    return LINEAR.fullmatch(pattern) is None and _ways(parser.parse(pattern)) > WAYS


def _parts(op: str, arg: Any) -> list[Any]:
    """The expressions inside a part of an expression."""
    if op == "BRANCH":
        return arg[1]
    if op in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT", "ASSERT", "ASSERT_NOT"):
        return [arg[-1]]
    return [arg] if op == "ATOMIC_GROUP" else [part for part in arg[1:] if part] if op == "GROUPREF_EXISTS" else []


def _holds(tree: Any, ops: tuple[str, ...]) -> bool:
    return any(str(op) in ops or any(_holds(part, ops) for part in _parts(str(op), arg)) for op, arg in tree)


def _ways(tree: Any) -> float:
    """Roughly the logarithm of the number of ways in which a text can be tried: 2 for a repetition, 1 for an option."""
    total = 0.0
    for op, arg in tree:
        name, parts = str(op), _parts(str(op), arg)
        inside = max(map(_ways, parts), default=0)
        if name == "BRANCH":
            total += 0.5 + inside
        elif name in REPEATS and arg[1] > 1:
            total += 2 if not inside else float("inf")
        else:
            total += inside + (name in REPEATS)
    return total


def _ends(tree: Any, text: str, starts: set[int], flags: int) -> set[int]:
    """The positions at which `tree` can end in `text`, when it begins at any of `starts`."""
    for op, arg in tree:
        if not starts:
            break
        starts = _step(str(op), arg, text, starts, flags)
    return starts


def _step(op: str, arg: Any, text: str, starts: set[int], flags: int) -> set[int]:
    if op == "BRANCH":
        return set().union(*(_ends(part, text, starts, flags) for part in arg[1]))
    if op == "SUBPATTERN":
        return _ends(arg[3], text, starts, (flags | arg[1]) & ~arg[2])
    if op in REPEATS:
        low, high, part = arg
        for _ in range(low):
            before, starts = starts, _ends(part, text, starts, flags)
            if starts == before:  # as it would be after any further number of times
                break
        reached = new = starts
        for _ in range(high - low):
            new = _ends(part, text, new, flags) - reached
            if not new:
                break
            reached = reached | new
        return reached
    if op in ("ASSERT", "ASSERT_NOT"):
        direction, part = arg
        back = part.getwidth()[0] if direction < 0 else 0
        held = {i for i in starts if i >= back and _looks(part, text, i, back, direction, flags)}
        return held if op == "ASSERT" else starts - held
    if op == "AT":
        return {i for i in starts if _stands(str(arg), text, i, flags)}
    return {i + 1 for i in starts if i < len(text) and _takes(op, arg, text[i], flags)}


def _looks(part: Any, text: str, i: int, back: int, direction: int, flags: int) -> bool:
    ends = _ends(part, text, {i - back}, flags)
    return i in ends if direction < 0 else bool(ends)


def _stands(where: str, text: str, i: int, flags: int) -> bool:
    if where.endswith("BOUNDARY"):
        word = [0 <= k < len(text) and CATEGORIES["WORD"](text[k]) for k in (i - 1, i)]
        return (word[0] != word[1]) == (where == "AT_BOUNDARY")
    lines = flags & re.MULTILINE and not where.endswith("STRING")
    if where.startswith("AT_BEGINNING"):
        return i == 0 or bool(lines and text[i - 1] == "\n")
    return i == len(text) or (where == "AT_END" and text[i] == "\n" and (bool(lines) or i == len(text) - 1))


def _takes(op: str, arg: Any, char: str, flags: int) -> bool:
    """Whether a part that stands for one character takes `char`."""
    forms = {char, char.lower(), char.upper()} if flags & re.IGNORECASE else {char}
    if op == "ANY":
        return char != "\n" or bool(flags & re.DOTALL)
    if op in ("LITERAL", "NOT_LITERAL"):
        return (chr(arg) in forms) == (op == "LITERAL")
    negated = str(arg[0][0]) == "NEGATE"
    found = False
    for kind, value in arg[negated:]:
        if str(kind) == "LITERAL":
            found |= chr(value) in forms
        elif str(kind) == "RANGE":
            found |= any(value[0] <= ord(form) <= value[1] for form in forms)
        else:
            name = str(value).removeprefix("CATEGORY_")
            found |= CATEGORIES[name.removeprefix("NOT_")](char) != name.startswith("NOT_")
    return found != negated
