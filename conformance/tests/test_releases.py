"""Older releases: what they do not have is unsupported, what they do otherwise is a known issue of a range of them."""

import fnmatch
import json
from pathlib import Path

import pytest

from conformance.driver import Rejected, Unsupported
from conformance.run import plan, runner

RELEASES = ("0.15.2", "0.17.1", "0.18.1", "0.19.1", "0.21.2")
ISSUES = json.loads((Path(runner.__file__).parent / "known_issues.json").read_text())["issues"]


def test_every_range_holds_a_release_that_is_checked():
    for issue in ISSUES:
        if issue["implementation"] == "peft":
            assert any(runner.in_range(release, issue["versions"]) for release in RELEASES), issue["what"]


def test_every_pattern_names_a_result():
    ids = {task.id for task in plan.tasks("full")}
    lost = [pattern for issue in ISSUES for pattern in issue["results"] if not fnmatch.filter(ids, pattern)]
    assert not lost


def driver_of(model):
    pytest.importorskip("torch")
    from conformance.drivers.peft_api import PeftApi

    driver = PeftApi("minipeft")
    driver.model = model
    return driver


def test_a_method_that_deletes_no_adapters_is_unsupported_and_a_crash_is_not():
    class Model:
        """Hands what it lacks to what it adapts, as PEFT's models do."""

        def __init__(self, asked):
            self.delete_adapter = lambda name: asked.delete_adapter(name)

        def get_base_model(self):
            return 1

    with pytest.raises(Unsupported, match="cannot be deleted"):
        driver_of(Model(1)).delete("other")
    with pytest.raises(AttributeError):
        driver_of(Model("a layer")).delete("other")


def test_a_model_type_that_a_release_does_not_offer_is_unsupported_and_other_errors_are_rejections():
    pytest.importorskip("torch")
    from conformance.drivers.peft_api import rejecting

    with pytest.raises(Unsupported), rejecting():
        raise ValueError("Unsupported model type for adaption prompt: 'gpt2'.")
    with pytest.raises(Rejected), rejecting():
        raise ValueError("Unsupported rank")


def test_a_trainable_parameter_without_a_gradient_has_one_of_zeros():
    torch = pytest.importorskip("torch")
    used, idle = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    driver = driver_of(torch.nn.ModuleDict({"used": used, "idle": idle}))
    driver.backward = lambda inputs, cotangent: used(torch.ones(1, 2)).sum().backward() or torch.zeros(1, dtype=int)
    found = driver.live_gradients({}, None)
    assert found["used.weight"].all() and not found["idle.weight"].any()
