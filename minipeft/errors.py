"""Every error and warning of minipeft: one family, so that `except PeftError` catches them all.

Each class also derives from the built-in error that peft 0.21.2 raises in the same place, so code written for peft
catches it too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftError(Exception):
    """Any error that minipeft raises about an adapter, a configuration or a checkpoint."""


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


class CheckpointError(PeftError, ValueError, RuntimeError):
    """An adapter's files cannot be read, or do not fit the model; nothing was loaded.

    A `RuntimeError` too, as torch's own of a state dict is: Trainer and diffusers look for that, and for the words
    "size mismatch for" where a shape is another.
    """


class MergeError(PeftError, ValueError):
    """The adapter cannot be written into the frozen weights, or doing so would give non-finite numbers."""


class BatchError(PeftError, ValueError):
    """A mixed batch (`adapter_names=[...]`) or a task id does not fit the input."""


class PeftWarning(UserWarning):
    """Any warning of minipeft."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """` Did you mean ...?` with the `known` names closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
