"""`pytest -p conformance.plugin --pyargs conformance --impl NAME`: the suite on an implementation, a test per check.

In a checkout `pytest conformance --impl NAME` does without the `-p`. Without `--impl` only the suite's own tests, in
`conformance/tests`, are collected.
"""

from __future__ import annotations

import sys

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("conformance")
    group.addoption("--impl", help="the implementation to check, as in python -m conformance")
    group.addoption("--impl-python", help="run it in this interpreter (default: pytest's own)")
    group.addoption("--impl-in-process", action="store_true", help="in pytest's own process, for a debugger")
    group.addoption("--profile", default="full", choices=["core", "full"])
    group.addoption("--methods", help="comma-separated")


def pytest_ignore_collect(collection_path, config):
    suite = collection_path.name == "test_implementation.py"
    own = collection_path.name == "tests" and collection_path.parent.name == "conformance"
    if config.getoption("--impl", None):
        return True if own else None
    return True if suite else None


@pytest.fixture(scope="session")
def driver(request):
    from conformance.drivers import open_driver

    option = request.config.getoption
    python = None if option("--impl-in-process") else option("--impl-python") or sys.executable
    driver = open_driver(option("--impl"), python, None if option("--impl-python") else option("--profile"))
    yield driver
    driver.close()


def pytest_generate_tests(metafunc):
    if metafunc.definition.path.name != "test_implementation.py" or "task" not in metafunc.fixturenames:
        return
    from conformance.run import plan

    methods = metafunc.config.getoption("--methods")
    if unknown := sorted({*(methods or "").split(",")} - {"", *plan.all_methods()}):
        raise pytest.UsageError(f"no method is called {', '.join(unknown)}")
    tasks = plan.tasks(metafunc.config.getoption("--profile"), methods.split(",") if methods else None)
    metafunc.parametrize("task", tasks, ids=[t.id for t in tasks])
