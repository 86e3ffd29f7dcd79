"""Drivers that come with the suite."""

from __future__ import annotations

import importlib
import shlex

from ..driver import START, Driver

SHIPPED = {"adapters": "adapters:AdapterHub", "loralib": "loralib:LoraLib", "lycoris": "lycoris:Lycoris",
           "minipeft-core": "minipeft_core:Core", "oracle": "oracle:Oracle", "torchtune": "torchtune:TorchTune"}


def open_driver(name: str, python: str | None = None, profile: str | None = None, seconds: float = START) -> Driver:
    """A driver by name: shipped, `cmd:<command line>` for a program that speaks JSON lines, `module:Class` for a driver
    of your own, else any importable module with PEFT's API. `python`: run it in that interpreter, as a process of its
    own, whose crash or hang takes nothing else along; `profile`: whole checks of it are run there, for which that
    interpreter must have all that the suite needs; `seconds`: how long it may take to start. A copy of a part of
    minipeft has the API of minipeft's core. Raises `ValueError` for a name that is none of these."""
    if name.startswith("cmd:"):
        from .process import Process

        if not (command := shlex.split(name[4:])):
            raise ValueError("'cmd:' needs the command line of a program, as in 'cmd:node driver.js'")
        return Process(command, seconds)
    if python:
        from .process import Process, WholeChecks

        command = [python, "-m", "conformance.serve", name]
        return WholeChecks(command, profile, seconds) if profile else Process(command, seconds)
    if ":" in name:
        module, _, cls = name.partition(":")
        return getattr(importlib.import_module(module), cls)()
    if name in SHIPPED:
        module, cls = SHIPPED[name].split(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), cls)()
    from .minipeft_core import Core
    from .peft_api import PeftApi

    library = importlib.import_module(name)
    parts = hasattr(library, "inject_adapter_in_model") and not hasattr(library, "get_peft_model")
    return Core(name) if parts else PeftApi(name)
