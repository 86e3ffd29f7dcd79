"""Every error and warning of minipeft: one family, so that `except PeftError` catches them all.

Each class also derives from the built-in error that peft 0.21.2 raises in the same place, so code written for peft
catches it too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 1000  # characters of a message: what a damaged file holds may be of any size


def cut(text: str, longest: int = LONGEST) -> str:
    """A text without its middle, if it is longer than `longest` characters."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"


def shown(value: object) -> str:
    """`repr(value)`, cut, for a message about it."""
    if isinstance(value, str):
        return repr(cut(value, 200))
    try:
        return cut(repr(value), 200)
    except (RecursionError, ValueError):  # nested too deeply, an int of too many digits
        return f"a {type(value).__name__}"


class PeftError(Exception):
    """Any error that minipeft raises about an adapter, a configuration or a checkpoint."""

    def __init__(self, *args: object):
        super().__init__(*(cut(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(PeftError, ValueError):
    """A configuration holds a value that cannot work; the message names the field and what it may be."""


class ConfigTypeError(PeftError, TypeError):
    """A configuration field has a value of the wrong type."""


class AdapterNameError(PeftError, ValueError):
    """An adapter name that is unknown, taken, or cannot be used as a key and as a folder name."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The targets of a configuration match no module or parameter of the model, or not all of them do."""


class UnsupportedLayerError(PeftError, ValueError, TypeError):
    """A method was aimed at a kind of layer that it cannot adapt."""


class UnsupportedFeatureError(PeftError, NotImplementedError, ValueError):
    """A field of the configuration asks for something that minipeft does not do."""


class NotIncludedError(PeftError, NotImplementedError):
    """What is asked for is in minipeft, but not in this part of it: the core alone, or a vendored copy."""


class CheckpointError(PeftError, ValueError, RuntimeError):
    """An adapter's files cannot be read, or do not fit the model; nothing was loaded.

    A `RuntimeError` too, as torch's own of a state dict is: Trainer and diffusers look for that, and for the words
    "size mismatch for" where a shape is another.
    """


class MergeError(PeftError, NotImplementedError, ValueError):
    """The adapter cannot be written into the frozen weights, or doing so would give non-finite numbers."""


class BatchError(PeftError, ValueError, TypeError):
    """A mixed batch (`adapter_names=[...]`) or a task id does not fit the input."""


class PeftWarning(UserWarning, RuntimeWarning):
    """Any warning of minipeft; peft has both of these."""

    def __init__(self, *args: object):
        super().__init__(*(cut(arg) if isinstance(arg, str) else arg for arg in args))


TOO_LARGE = re.compile(  # what torch, numpy and Python say of sizes that no tensor can have
    "alloc_cpu|not enough memory|unable to allocate|size calculation overflowed|multiplication overflow|too big|"
    "failed to unpack|too large|dimension exceeded",
    re.IGNORECASE,
)


@contextmanager
def sized() -> Iterator[None]:
    """While it is open, tensors too large to be made are a `ConfigError`: their sizes are out of a configuration."""
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, PeftError) or not (isinstance(error, MemoryError) or TOO_LARGE.search(str(error))):
            raise
        raise ConfigError(f"The configuration asks for tensors that are too large: {error}") from error


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """` Did you mean ...?` with the `known` names closest to `name`, or an empty string when none is close."""
    known = [other for other in known if len(other) <= 200] if len(name) <= 200 else []
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
