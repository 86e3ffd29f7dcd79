"""Which layers a config means: models with decoy names, one row for each rule, over all methods that choose layers.

What is compared is what a checkpoint holds, key by key with its shape, and for patterns of alpha how strong each layer
is. `fixtures/targets.json` has the rows as the reference answers them; `reference/rules.py` says the same in Python.
"""

from __future__ import annotations

import numpy as np

from ...driver import Rejected
from ...reference import kappa
from ...reference.bases import BASES, of_type
from ...reference.compare import Failure
from ...reference.draw import draw_base, rng_of
from ...reference.methods import methods
from .goldens import same_set


def config_of(row: dict) -> dict:
    return {**row["config"], "peft_type": methods()[row["method"]].peft_type}


def build(driver, row, model_type=None):
    base = of_type(BASES[row["base"]], model_type) if model_type else BASES[row["base"]]
    weights = draw_base(BASES[row["base"]], rng_of("targets"))
    if "strengths" in row:  # what is merged is the adapter alone
        weights = {name: np.zeros_like(value) for name, value in weights.items()}
    driver.build(base, weights, config_of(row), "float32", case=f"{row['method']}/targets/{row['id']}")


def strengths(driver) -> dict[str, float]:
    """What each weight is when all tensors of an adapter are 1 and all weights 0."""
    driver.load({k: np.ones_like(v, np.float32) for k, v in driver.state_dict().items()})
    driver.merge()
    return {k: float(v.max()) for k, v in driver.weights().items() if v.any()}


def same_keys(got, keys, where=""):
    same_set(f"saved keys{where}", got, keys)
    for key, shape in keys.items():
        if shape is not None and list(got[key].shape) != shape:
            raise Failure(f"shape of {key}{where}", expected=str(shape), got=str(list(got[key].shape)))


# they choose layers otherwise, or hold what is there for all layers
ALONE = ("bdlora", "frod", "ln_tuning", "randlora", "trainable_tokens")


def first_beside(row) -> dict | None:
    """The config of an adapter that is there first, on every linear layer; None: the row is about something else."""
    base, config = BASES[row["base"]], config_of(row)
    if "layers" not in base or row["method"] in ALONE or {
            "target_parameters", "modules_to_save", "task_type", "layer_replication", "feedforward_modules"} & {
            k for k, v in config.items() if v}:
        return None
    named = [name for name, kind, _ in base["layers"] if kind == "Linear"]
    if row["method"] == "lora":
        return {"peft_type": "LORA", "r": 3, "lora_alpha": 2, "target_modules": named}
    return {**methods()[row["method"]].rows[0].config, "peft_type": config["peft_type"], "target_modules": named}


def beside(driver, rows):
    """The same layers are meant where another adapter is on every layer already."""
    for row in rows:
        if row.get("refused") or "types" in row or (first := first_beside(row)) is None:
            continue
        weights = draw_base(BASES[row["base"]], rng_of("targets"))
        driver.build(BASES[row["base"]], weights, first, "float32", case=f"{row['method']}/targets-beside/{row['id']}")
        own = {k: list(v.shape) for k, v in driver.state_dict().items()}
        driver.add("other", {**config_of(row), **methods()[row["method"]].laws.second})
        same_keys(driver.state_dict("other"), row["keys"], f" of a second adapter, row {row['id']}")
        same_keys(driver.state_dict(), own, f" of the first adapter, beside row {row['id']}")


def check(driver, row):
    if row.get("refused"):
        try:
            build(driver, row)
        except Rejected:
            return
        raise Failure("a config that means nothing was accepted", expected="a clear error", got="no error")
    for model_type, keys in row.get("types", {}).items():
        build(driver, row, model_type)
        same_keys(driver.state_dict(), keys, f" on a model of type {model_type}")
    if "types" in row:
        return
    build(driver, row)
    same_keys(driver.state_dict(), row["keys"])
    if "strengths" in row:
        found = strengths(driver)
        same_set("merged weights that the adapter changes", found, row["strengths"])
        for name, want in row["strengths"].items():
            if not np.isclose(found[name], want, rtol=1e-5):
                raise Failure(f"strength of the adapter on {name}", expected=f"{want:.7g}", got=f"{found[name]:.7g}")


EXPERTS = {"top_p": 0.5, "moe_param_suffixes": [".weight"]}
CONDITIONED: tuple[tuple[str, dict], ...] = (
    ("blocks", {"top_p": 0.2}), ("blocks", {"top_p": 0.6}), ("blocks", {"top_p": 0.1}), ("experts", EXPERTS),
    ("experts", {**EXPERTS, "moe_param_suffixes": [".gate"]}), ("names", {"top_p": 1.0}),
    ("names", {"top_p": 1.0, "max_dim_size_to_analyze": 10}), ("names", {"top_p": 1.0, "max_dim_size_to_analyze": 12}))


def conditioned(driver):
    """The layers that KappaTune chooses, the best conditioned first, and the parameters of experts."""
    for name, options in CONDITIONED:
        base = BASES[name]
        weights = draw_base(base, rng_of(f"kappa {name}"))
        got, want = driver.best_conditioned(base, weights, options), kappa.chosen(base, weights, **options)
        if got != want:
            raise Failure(f"layers that are chosen by their condition, {options}", expected=str(want), got=str(got))
