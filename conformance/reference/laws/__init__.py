"""Properties that hold for every method, whatever the numbers: one file per law, found by itself.

Each file has `TITLE`, `applies(method)` and `check(driver, sample)`, which raises `Failure`. Hypothesis draws samples:
`EXAMPLES` of them, or `MOST` where a law says that it hardly depends on the config.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import tempfile
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from .. import store
from ..bases import BASES
from ..compare import Failure, close
from ..draw import draw_adapter, draw_base, draw_inputs
from ..method import Method

EXAMPLES = {"core": 2, "full": 8}


@dataclass
class Sample:
    """A base model, a config and how the adapter's tensors are made: they follow from what the driver saves."""

    method: Method
    base_name: str
    config: dict
    seed: int
    dtype: str = "float32"
    inputs: dict = field(init=False)
    weights: dict = field(init=False)

    def __post_init__(self):
        self.base = BASES[self.base_name]
        self.rng = np.random.default_rng(self.seed)
        self.weights = draw_base(self.base, self.rng)
        self.inputs = draw_inputs(self.base, self.method.laws.inputs, self.rng)
        self.config = store.resolved({"peft_type": self.method.peft_type, **self.config})

    def on(self, base_name, **more):
        """The same on another base model, with more in the config; base models of equal shapes have equal weights."""
        return Sample(self.method, base_name, {**self.config, **more}, self.seed, self.dtype)

    def tensors(self, driver, name="default", seed=0):
        """Values for the adapter's tensors, away from where training starts."""
        state = driver.state_dict(name)
        frozen = {key for key in state if self.method.tensors.is_frozen(key)}
        return draw_adapter(self.method, state, frozen, np.random.default_rng((self.seed, seed)))

    def build(self, driver, config=True, dtype=None):
        """The adapted model, its tensors new; with `config` None the bare base model."""
        driver.build(self.base, self.weights, self.config if config else None, dtype or self.dtype,
                     case=f"{self.method.name}/law", seed=self.seed)

    def start(self, driver, dtype=None):
        """The adapted model with its tensors set, which are returned."""
        self.build(driver, dtype=dtype)
        tensors = self.tensors(driver)
        driver.load(tensors)
        return tensors

    def second(self, driver, **more):
        """Add and fill another adapter, "other", with more in its config; the active one stays. Its tensors."""
        driver.add("other", {**self.config, **self.method.laws.second, **more})
        tensors = self.tensors(driver, "other", seed=1)
        driver.load(tensors, "other")
        return tensors

    def base_output(self, driver):
        self.build(driver, config=None)
        return driver.forward(self.inputs)

    def same(self, what, got, want, dtype=None):
        try:
            close(what, got, want, dtype or self.dtype)
        except Failure as e:
            e.message += f", config {self.config} on {self.base_name}"
            raise


@cache
def laws() -> dict:
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return {n: importlib.import_module(f"{__name__}.{n}") for n in names}


@cache
def scratch() -> tempfile.TemporaryDirectory:
    """A folder that goes with the process."""
    return tempfile.TemporaryDirectory()


def hold(law, method: Method, examples: int, driver) -> None:
    """Check one law for one method on drawn configs; the first counterexample is raised."""
    from hypothesis import HealthCheck, Phase, configuration, given, settings
    from hypothesis import strategies as st

    if "HYPOTHESIS_STORAGE_DIRECTORY" not in os.environ:
        configuration.set_hypothesis_home_dir(scratch().name)  # not `.hypothesis` in the current folder
    more = method.laws.draw_fresh if getattr(law, "DRAWS_INITIALISATIONS", False) else {}
    fields = {**method.laws.draw, **more}
    drawn = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in fields.items()})

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(method.laws.bases), drawn, st.integers(0, 2**31))
    def run(base_name, config, seed):
        law.check(driver, Sample(method, base_name, config, seed))

    run()
