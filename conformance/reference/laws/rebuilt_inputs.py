"""VeLoRA, section 3: A's gradient comes from inputs rebuilt from one number for each of their parts; the direction is
the mean of all parts of a batch, of the first one, or drawn."""

from functools import partial

import numpy as np

from .. import formulas
from ..method import slots
from ..methods import lora
from ..numpy_model import apply_layer, sites

TITLE = "rebuilt inputs"
MOST = 1
V = "lora_velora_embed"
KINDS = ({"num_groups": 3, "init_type": "batch_average", "scale": 0.5},
         {"num_groups": 4, "init_type": "batch_average_once", "scale": 2.0},  # 6 features: the last part is filled up
         {"num_groups": 4, "init_type": "random", "scale": 1.5})


def applies(method):
    return method.name == "velora"


def parts(x, n):
    width = -(-x.shape[-1] // n)
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width * n - x.shape[-1])])
    return x.reshape(*x.shape[:-1], n, width)


def direction(x, n):
    mean = parts(x, n).reshape(-1, -(-x.shape[-1] // n)).mean(0)
    return mean / np.linalg.norm(mean)


def rebuilt(x, v, how):
    p = parts(x, how["num_groups"])
    return (how["scale"] * (p @ v)[..., None] * v).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def route(taken, base, folded, tensors, c, inputs, held=None, weights=None):
    """The layers, in which a change of A meets the rebuilt input; `taken`: path -> v, where that is known."""
    how, held = c["velora_config"], held or tensors
    found = {}
    for path, site in sites(base, weights).items():
        if t := slots(tensors, path):
            def layer(_, x, path=path, site=site, t=t):
                A = np.asarray(slots(held, path)["lora_A.weight"], np.float64)
                v = taken.setdefault(path, direction(x, how["num_groups"]))
                h = x @ A.T + rebuilt(x, v, how) @ (np.asarray(t["lora_A.weight"], np.float64) - A).T
                return apply_layer(site, x) + lora.scaling(site, c) * h @ np.asarray(t["lora_B.weight"], np.float64).T

            found[path] = layer
    return found


def known(taken, base, folded, tensors, c, inputs, held=None, weights=None):
    """The layers, their directions being held."""
    return route(dict(taken), base, folded, tensors, c, inputs, held, weights)


def check(driver, sample):
    for how in KINDS:
        one_kind(how, driver, sample.on(sample.base_name, velora_config=how))


def one_kind(how, driver, sample):
    tensors = sample.start(driver)
    paths = sample.config["target_modules"]
    given = {p: np.asarray(slots(tensors, p)[V], np.float64) for p in paths}
    if how["init_type"] != "random":  # nothing was seen yet
        sample.build(driver)
        own = driver.state_dict()
        tensors = {k: own[k] if k.endswith(V) else v for k, v in tensors.items()}
        driver.load(tensors)
    rng, taken = np.random.default_rng(sample.seed), dict(given) if how["init_type"] == "random" else {}
    driver.train(True)
    for _ in range(2):
        inputs = {"x": rng.normal(size=sample.inputs["x"].shape) + 0.5}
        if how["init_type"] == "batch_average":
            taken = {}
        y = formulas.output(sample.method, sample.base, sample.weights, tensors, sample.config, inputs,
                            route=partial(route, taken, weights=sample.weights))
        cotangent = rng.normal(size=y.shape)
        want = formulas.gradients(sample.method, sample.base, sample.weights, tensors, sample.config, inputs, cotangent,
                                  route=partial(known, dict(taken), weights=sample.weights))
        got = driver.gradients(inputs, cotangent)
        for key, value in want.items():
            sample.same(f"gradient of {key} in training", got[key], value)
        for key, value in driver.state_dict().items():
            if key.endswith(V):
                path = key.removeprefix("base_model.model.").removesuffix(f".{V}")
                sample.same(f"{key} after a batch", value, taken[path])
    driver.train(False)
