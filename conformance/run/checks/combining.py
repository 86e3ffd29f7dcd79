"""One adapter made of several: PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from ...reference import formulas
from ...reference.combine import combined
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter, rng_of
from ...reference.method import KEY
from ...reference.methods import lora
from ...reference.numpy_model import run, sites, stored
from .bookkeeping import same_output
from .goldens import same_set, start
from .reject import refuse

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


def combine(driver, case, method, how, patterns=None):
    """Of two LoRA adapters of the same rank and other scales, one; `patterns`: fields of the first one's config."""
    weights, options = COMBINED[how]
    rng, adapter, base = rng_of(f"{case.id} second"), case.tensors("adapter"), case.tensors("base")
    second = {**case.config, "lora_alpha": 3 * case.config["lora_alpha"]}
    other = draw_adapter(method, adapter, set(), rng)
    first = {**case.config, **(patterns or {})}
    driver.build(case.base, base, first, "float32", case=case.id)
    driver.load(adapter)
    driver.add("other", second)
    driver.load(other, "other")
    driver.combine(["default", "other"], weights, "both", options)
    if not patterns:
        same_output(driver, case, "output after making another adapter, not yet active")
    folded = dict(base)
    for path, site in sites(case.base, base).items():
        if path in case.targets:
            a, b = slots = lora.names(site)
            factors = [(t[f"{KEY}{path}.{a}"], t[f"{KEY}{path}.{b}"], lora.scaling(site, c))
                       for t, c in ((adapter, first), (other, second))]
            made = combined(factors, weights, **options)
            folded[site.weight] = stored(site, site.W + lora.delta(site, dict(zip(slots, made))))
    driver.switch(["both"])
    close("output of the adapter made of two", driver.forward(case.tensors("input")),
          run(case.base, folded, case.tensors("input")), "float32")


def combine_with_saved(driver, case, method):
    """Two adapters that save the same module whole are refused; what becomes of one's is not agreed upon."""
    start(driver, case, "float32")
    driver.add("other", {**case.config, "modules_to_save": ["head"]})
    driver.add("third", {**case.config, "modules_to_save": ["head"]})
    refuse("an adapter made of two that save the same module", partial(
        driver.combine, ["other", "third"], [0.5, 0.5], "both",
        {"combination_type": "linear"} if method.name == "lora" else {}))


def combine_smaller_first(driver, case, method):
    """By "svd", and without a rank, the new adapter has the largest one."""
    driver.build(case.base, case.tensors("base"), {**case.config, "r": 2}, "float32", case=f"{method.name}/smaller")
    driver.add("other", case.config)
    driver.combine(["default", "other"], [0.5, 0.5], "both", {"combination_type": "svd"})
    ranks = {min(v.shape) for k, v in driver.state_dict("both").items()}
    if ranks != {case.config["r"]}:
        raise Failure("ranks of an adapter made of two by svd", expected=str(case.config["r"]), got=str(ranks))


def combined_dtypes(driver, case, method):
    """An adapter made of others, factor by factor, has their dtype; what other ways give is not agreed upon."""
    for how in ("linear", "ties", "magnitude-prune"):
        for options, want in (({"autocast_adapter_dtype": False}, "bfloat16"), ({}, "float32")):
            driver.build_with(case.base, case.tensors("base"), case.config, "bfloat16", options, case=case.id)
            driver.load(case.tensors("adapter"))
            driver.add_with("other", case.config, options)
            driver.load(case.tensors("adapter"), "other")
            driver.combine(["default", "other"], *COMBINED[how][:1], "both", COMBINED[how][1])
            if wrong := {k: v for k, v in driver.dtypes().items() if ".both." in k and v != want}:
                raise Failure(f"dtypes of an adapter made of two in {want}, {how}", expected=want, got=str(wrong))


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


def combine_ia3_others(driver, case, method):
    """Of adapters on different layers: all of these, those of the input as well as those of the output.

    On a layer that only one is on, the other one counts as 0, as in PEFT, or as 1, which is what it does there.
    """
    base = case.tensors("base")
    configs = [{**case.config, "target_modules": targets, "feedforward_modules": inputs} for targets, inputs in (
        (["up"], ["up"]), (["mid", "head"], ["head"]))]
    driver.build(case.base, base, configs[0], "float32", case=f"{method.name}/combined")
    driver.add("other", configs[1])
    drawn: list[dict] = []
    for name in ("default", "other"):
        drawn.append(draw_adapter(method, driver.state_dict(name), set(), rng_of(f"ia3 {name}")))
        driver.load(drawn[-1], name)
    driver.combine(["default", "other"], [0.75, 0.5], "both", {})
    whole = {"target_modules": ["up", "mid", "head"], "feedforward_modules": ["up", "head"]}
    for field, want in whole.items():
        if sorted(got := driver.config_of("both").get(field) or ()) != sorted(want):
            raise Failure(f"{field} in the config of an adapter made of two", expected=str(want), got=str(got))
    driver.switch(["both"])
    parts = {k: w * v for w, tensors in zip((0.75, 0.5), drawn) for k, v in tensors.items()}
    neutral = {k: v + (0.75 if k in drawn[1] else 0.5) for k, v in parts.items()}  # the one that is not there is 1
    alone, beside = (formulas.output(method, case.base, base, tensors, {**case.config, **whole}, case.tensors("input"))
                     for tensors in (parts, neutral))
    close("output of the adapter made of two on different layers", driver.forward(case.tensors("input")), alone,
          "float32", also=beside)


OTHER_LAYERS: dict[str, dict] = {
    "linear": {"combination_type": "linear"}, "cat": {"combination_type": "cat"},
    "svd": {"combination_type": "svd"}, "ties-svd": {"combination_type": "ties_svd", "density": 0.8},
    "magnitude-prune-svd": {"combination_type": "magnitude_prune_svd", "density": 0.8}}


def combine_others(driver, case, method, how, regex=False):
    """Of two adapters on other layers, and of other ranks where that may be, one that is on all of theirs; it is saved
    and loaded."""
    sign = 1 if "ties" in how else -1  # what the sign of a weight does to an election is not agreed upon
    options, weights = OTHER_LAYERS[how], {"default": 0.75, "other": 0.5 * sign, "third": 1.25}
    targets, rng = case.config["target_modules"], rng_of(f"others {how}")
    ranks = {} if how == "linear" else {"r": case.config["r"] - 2}
    configs = {"default": {**case.config, "target_modules": targets[:1]},
               "other": {**case.config, "lora_alpha": 3 * case.config["lora_alpha"], "target_modules": targets[1:],
                         **ranks}, "third": {**case.config, "lora_alpha": 1}}
    if regex:
        configs = {k: {**c, "target_modules": "|".join(c["target_modules"])} for k, c in configs.items()}
    held: dict = {}
    driver.build(case.base, case.tensors("base"), configs["default"], "float32", case=f"{method.name}/others")
    for name, config in configs.items():
        if name != "default":
            driver.add(name, config)
        held[name] = draw_adapter(method, driver.state_dict(name), set(), rng)
        driver.load(held[name], name)
    driver.combine(list(configs), list(weights.values()), "both", options)
    folded = dict(case.tensors("base"))
    for path, site in sites(case.base, case.tensors("base")).items():
        a, b = slots = lora.names(site)
        there = [name for name in configs if f"{KEY}{path}.{a}" in held[name]]
        if there:
            factors = [(held[n][f"{KEY}{path}.{a}"], held[n][f"{KEY}{path}.{b}"], lora.scaling(site, configs[n]))
                       for n in there]
            more = {"svd_rank": case.config["r"]} if "svd" in how else {}
            made = combined(factors, [weights[n] for n in there], **{**options, **more})
            folded[site.weight] = stored(site, site.W + lora.delta(site, dict(zip(slots, made))))
    want = run(case.base, folded, case.tensors("input"))
    driver.switch(["both"])
    close("output of the adapter made of several on other layers", driver.forward(case.tensors("input")), want,
          "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save_adapters(path, ["both"])
        driver.restore(str(Path(path, "both")), case.base, case.tensors("base"), "float32")
    close("output of that adapter, saved and loaded,", driver.forward(case.tensors("input")), want, "float32")


def combine_refused(driver, case, method):
    """Adapters that are not there, ranks that do not fit together, a way that there is not; then all is as before."""
    start(driver, case, "float32")
    driver.add("other", {**case.config, "r": case.config["r"] - 1})
    names = driver.names()
    for what, of, options in (("an adapter that is not there", ["default", "nobody"], {"combination_type": "svd"}),
                              ("two ranks, linearly,", ["default", "other"], {"combination_type": "linear"}),
                              ("two ranks, by TIES,", ["default", "other"], {"combination_type": "ties",
                                                                            "density": 0.5}),
                              ("a way that there is not", ["default", "other"], {"combination_type": "no-such-way"})):
        refuse(f"an adapter made of others, of {what}", partial(driver.combine, of, [1.0, 1.0], "both", options))
        same_set(f"live parameter names after {what} was refused", driver.names(), names)
    same_output(driver, case, "output after that was refused")
    driver.combine(["default"], [2.0], "both", {"combination_type": "svd"})
    driver.switch(["both"])
    before, merged = driver.weights(), case.tensors("merged")
    driver.merge()
    for name, want in merged.items():
        close(f"{name} with an adapter made of one, of twice its strength, merged", driver.weights()[name],
              before[name] + 2 * (want - before[name]), "float32")


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
