"""Which implementation is under test, and the reference it is compared with."""

import functools
import importlib
import os
import warnings

import pytest
import torch

from . import harness
from .cases import CASES
from .cases.case import Case


@pytest.fixture(scope="session")
def lib():
    """The module under test: `minipeft`, or the one that MINIPEFT_UNDER_TEST names."""
    return importlib.import_module(os.environ.get("MINIPEFT_UNDER_TEST", "minipeft"))


@pytest.fixture(scope="session")
def ref():
    """peft, the reference."""
    peft = pytest.importorskip("peft", reason="peft is not installed: there is nothing to compare with")
    from jinja2 import Environment
    from peft.tuners.adamss.layer import Linear

    # each model card's template, of thousands, is the same
    Environment.compile = functools.lru_cache(Environment.compile)
    # such a layer notes the dtype that it is made in, and fails when the model is moved to another
    Linear.dtype = property(lambda self: self.get_base_layer().weight.dtype, lambda self, made_in: None)
    return peft


@pytest.fixture
def is_ref(lib):
    return lib.__name__ == "peft"


@pytest.fixture(autouse=True)
def _quiet(request):
    """One thread (the models are tiny), the global seed restored, warnings of the reference not shown."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case is not None and case.base.transformers:
        pytest.importorskip("transformers", reason="transformers is not installed: the case's base model is one of its")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pytest_collection_modifyitems(items):
    """The tests of each file case by case, so that they can share what is made for a case (harness.shared)."""
    files, places = {}, {case.id: place for place, case in enumerate(CASES)}

    def place(item):
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        return files.setdefault(item.path, len(files)), places.get(case.id, -1) if isinstance(case, Case) else -1

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def _own():
    """What one file shares, no other is given."""
    yield
    harness.MADE.clear()


def pytest_exception_interact():
    """What a test that fails leaves half done, no other is given."""
    harness.MADE.clear()


def pytest_configure(config):
    torch.set_num_threads(1)
