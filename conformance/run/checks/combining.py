"""One adapter made of several: PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import numpy as np

from ...reference import formulas
from ...reference.combine import combined
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter, rng_of
from ...reference.method import KEY
from ...reference.methods import lora
from ...reference.numpy_model import run, sites, stored
from .bookkeeping import same_output
from .goldens import start

COMBINED: dict[str, tuple[list, dict]] = {
    "linear": ([0.75, 0.5], {"combination_type": "linear"}),
    "linear-negative": ([0.75, -0.5], {"combination_type": "linear"}),
    "cat": ([0.75, -0.5], {"combination_type": "cat"}),
    "svd": ([0.75, -0.5], {"combination_type": "svd"}),
    "svd-rank": ([1.0, 0.5], {"combination_type": "svd", "svd_rank": 2}),
    "ties": ([0.75, 0.5], {"combination_type": "ties", "density": 0.6}),
    "ties-frequency": ([0.75, 0.5], {"combination_type": "ties", "density": 0.8, "majority_sign_method": "frequency"}),
    "ties-svd": ([0.75, 0.5], {"combination_type": "ties_svd", "density": 0.6, "svd_rank": 6}),
    "magnitude-prune": ([0.75, -0.5], {"combination_type": "magnitude_prune", "density": 0.4}),
    "magnitude-prune-svd": ([0.75, 0.5], {"combination_type": "magnitude_prune_svd", "density": 0.4, "svd_rank": 6}),
    "dare-linear-all": ([0.75, 0.5], {"combination_type": "dare_linear", "density": 1.0}),
}

COMBINED_TOO = [(kind, how) for kind in ("embedding", "conv2d") for how in ("linear-negative", "cat", "svd")]


def combine(driver, case, method, how):
    """Of two LoRA adapters of the same rank and other scales, one."""
    weights, options = COMBINED[how]
    rng, adapter, base = rng_of(f"{case.id} second"), case.tensors("adapter"), case.tensors("base")
    second = {**case.config, "lora_alpha": 3 * case.config["lora_alpha"]}
    other = draw_adapter(method, adapter, set(), rng)
    start(driver, case, "float32")
    driver.add("other", second)
    driver.load(other, "other")
    driver.combine(["default", "other"], weights, "both", options)
    same_output(driver, case, "output after making another adapter, not yet active")
    folded = dict(base)
    for path, site in sites(case.base, base).items():
        if path in case.targets:
            a, b = slots = lora.names(site)
            factors = [(t[f"{KEY}{path}.{a}"], t[f"{KEY}{path}.{b}"], lora.scaling(site, c))
                       for t, c in ((adapter, case.config), (other, second))]
            made = combined(factors, weights, **options)
            folded[site.weight] = stored(site, site.W + lora.delta(site, dict(zip(slots, made))))
    driver.switch(["both"])
    close("output of the adapter made of two", driver.forward(case.tensors("input")),
          run(case.base, folded, case.tensors("input")), "float32")


def combine_ia3(driver, case, method):
    """The weighted sum of the vectors."""
    adapter = case.tensors("adapter")
    other = draw_adapter(method, adapter, set(), rng_of(f"{case.id} second"))
    start(driver, case, "float32")
    driver.add("other", case.config)
    driver.load(other, "other")
    driver.combine(["default", "other"], [0.75, -0.5], "both", {})
    driver.switch(["both"])
    sums = {k: 0.75 * v - 0.5 * other[k] for k, v in adapter.items()}
    close("output of the adapter made of two", driver.forward(case.tensors("input")), formulas.output(
        method, case.base, case.tensors("base"), sums, case.config, case.tensors("input")), "float32")


DENSITY = 0.6


def dare(driver, case, method, how):
    """A share of each factor's entries is kept, drawn, and divided by that share; then they are added, as ever."""
    adapter = case.tensors("adapter")
    other = draw_adapter(method, adapter, set(), rng_of(f"{case.id} second"))
    weights = [0.75, 0.5]
    none = count = 0
    for seed in range(4):
        driver.build(case.base, case.tensors("base"), case.config, "float32", case=case.id, seed=seed)
        driver.load(adapter)
        driver.add("other", case.config)
        driver.load(other, "other")
        driver.combine(["default", "other"], weights, "both", {"combination_type": how, "density": DENSITY})
        made = driver.state_dict("both")
        for key in adapter:
            size = np.sqrt(np.array(weights) * case.config["lora_alpha"] / case.config["r"]) / DENSITY
            one, two = (s * np.asarray(t[key], np.float64) for s, t in zip(size, (adapter, other)))
            choices = np.stack([one * 0, one, two, (one + two) / (2 if how == "dare_ties" else 1)])
            off = np.abs(choices - np.asarray(made[key], np.float64))
            if off.min(0).max() > 1e-5 * np.abs(choices).max():
                raise Failure(f"{key} of {how} with a density of {DENSITY}: entries that are not made of those of "
                              "either adapter, divided by the density",
                              expected=str(choices[:, 0, 0]), got=str(made[key][0, 0]))
            none += (off.argmin(0) == 0).sum()
            count += off[0].size
    share = (1 - DENSITY) ** 2
    if abs(none / count - share) > 6 * np.sqrt(share * (1 - share) / count):
        raise Failure(f"the share of entries that {how} drops of both adapters, with a density of {DENSITY}",
                      expected=f"{share:.3f}", got=f"{none / count:.3f}")
