"""The checks as pytest tests; `conftest.py` makes one of each task."""

import pytest

from conformance.run import causes, runner


@pytest.fixture(scope="session")
def info(driver):
    return driver.info()


@pytest.fixture(scope="session")
def issues(info):
    return runner.known_issues(info["name"], info["version"])


def test_check(task, driver, info, issues):
    if task.dtype not in info["dtypes"]:
        pytest.skip(f"no {task.dtype}")
    result = runner.apply_known(runner.run_one(driver, task), issues)
    causes.name_causes([task], [result])
    if result.outcome == "unsupported":
        pytest.skip(result.message)
    if result.outcome == "known-issue":
        pytest.xfail(f"{result.message} ({result.link})")
    likely = f"\nlikely mistake: {result.cause}" if result.cause else ""
    detail = f"\nexpected {result.expected}\ngot      {result.got}" if result.expected else ""
    assert result.outcome == "pass", f"{result.outcome}: {result.message}{detail}{likely}"
