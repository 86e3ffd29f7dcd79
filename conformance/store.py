"""The golden data as Python objects: `packs()` has every case by method. It is `conformance.reference.store`."""

from .reference.store import *  # noqa: F403
