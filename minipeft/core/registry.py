"""Which methods there are, and the files they stand in, which are imported when they are asked for.

The classes of a method enter tables of their own as its file is imported (`CONFIGS`, `ADAPTERS`, ...): a method that
is written outside of this package only has to be imported.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata
from typing import Any

from .errors import NotIncludedError

PLUGINS = "minipeft.methods"  # the group of entry points: peft_type = module
FILES: dict[str, str] = {}  # peft_type -> the module with the configuration and the adapter
MODELS: dict[str, str] = {}  # peft_type -> the module with a class of its own for models with such adapters
VARIANTS: dict[str, dict[str, str]] = {}  # peft_type -> field of its configuration -> the module for it
STARTS: dict[str, dict[str, str]] = {}  # peft_type -> name of a way to set its initial values -> the module for it
TUNERS: dict[str, str] = {}  # name of a tuner class -> peft_type
BESIDE: dict[str, str] = {}  # a field of any configuration -> the peft_type of the method that it adds to another


@functools.cache
def load(peft_type: str) -> None:
    """Import a method's configuration and adapter."""
    if module := FILES.get(peft_type):
        importlib.import_module(module)


@functools.cache
def load_model(peft_type: str) -> None:
    """The same, with the class that models with such adapters have."""
    load(peft_type)
    if module := MODELS.get(peft_type):
        importlib.import_module(module)


def load_plugin(peft_type: str) -> None:
    """Import a method that an installed package offers: an entry point of that name in the group `minipeft.methods`."""
    for found in metadata.entry_points(group=PLUGINS, name=peft_type):
        found.load()


@functools.cache
def load_variant(peft_type: str, field: str) -> None:
    """Import the variant of a method that a field of its configuration asks for."""
    _imported(VARIANTS[peft_type], field)


def load_start(peft_type: str, name: str) -> Any:
    """The module with a way to set a method's initial values."""
    return _imported(STARTS.get(peft_type, {}), name)


def _imported(modules: dict[str, str], name: str) -> Any:
    if not (module := modules.get(name)):
        raise NotIncludedError(f"`{name}` is not in this copy of minipeft, which holds a part of its methods.")
    return importlib.import_module(module)


def load_all() -> None:
    """Import every method and variant."""
    for peft_type in FILES:
        load_model(peft_type)
        for field in VARIANTS.get(peft_type, ()):
            load_variant(peft_type, field)
