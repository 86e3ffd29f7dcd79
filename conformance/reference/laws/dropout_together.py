"""Dropout of several adapters at once, or of several parts of one: each by draws and a rate of its own."""

import numpy as np

from .. import dropout, formulas
from ..compare import Failure
from ..method import slots
from ..numpy_model import apply_layer, sites
from .dropout import FURTHEST, TOLERANCE

TITLE = "dropout together"
MOST = 1
BASE, LAYER = "blocks", "model.layers.2.v_proj"  # behind which no layer bends what is added
CALLS, SAMPLES = {"input": 4, "rows": 40, "all": 64}, {"input": 32, "rows": 2, "all": 2}
MORE = {"vblora": {"vector_length": 2}}


def together(d, method):
    """How many adapters at once, if the law holds for this dropout; else 0."""
    if d.drops == "blocks" or method.tensors.gauges or method.name == "bdlora":
        return 0
    return 1 if d.apart else 2 if method.laws.stacks else 0


def applies(method):
    return any(together(d, method) for d in dropout.of(method))


def check(driver, sample):
    for d in dropout.of(sample.method):
        if count := together(d, sample.method):
            config = {**MORE.get(d.method, {}), **d.more, "target_modules": [LAYER]}
            several(d, driver, sample.on(BASE, **config, **{d.rate: 0.25}), count)


def several(d, driver, sample, count):
    rates = {"default": 0.25, "other": 0.5} if count == 2 else {"default": 0.25}
    sample.inputs = {"x": np.random.default_rng(sample.seed).normal(size=(SAMPLES[d.drops], 6))}
    held = {"default": sample.start(driver)}
    if count == 2:
        held["other"] = sample.second(driver, **{d.rate: rates["other"]})
        driver.switch(list(rates))
    driver.train(True)
    drawn = np.stack([driver.forward(sample.inputs) for _ in range(CALLS[d.drops])]).astype(np.float64)
    driver.train(False)
    at = sites(sample.base, sample.weights)
    bare = {"x": formulas.output(sample.method, {**sample.base, "layers": sample.base["layers"][:-2]}, sample.weights,
                                 {}, {}, sample.inputs, route=lambda *a: {})}
    drawn = drawn - apply_layer(at["head"], apply_layer(at[LAYER], bare["x"]))
    known = []
    for name, rate in rates.items():
        t = {**slots(held[name], LAYER), **formulas.shared_tensors(sample.method, held[name])}
        t = {k: np.asarray(v, np.float64) for k, v in t.items()}
        known += dropout.parts(d, sample.method.formula, at[LAYER], t, {**sample.config, d.rate: rate}, bare["x"])
    known = [part @ at["head"].W.T for part in known]
    rates = list(rates.values()) * (len(known) // count)
    compare(d, sample, drawn, known, rates, dropout.choices(d, at[LAYER], t, 0.25, bare["x"]))


def compare(d, sample, drawn, known, rates, kept):
    """Each output is a sum of one of the first and one of the second, and their shares are as the rates say."""
    first, second = known
    if d.drops != "input":  # one choice for the whole call
        first, second, drawn = (a.reshape(len(a), 1, -1) for a in (first, second, drawn))
    found, rounding = [], 1e-6 * np.abs(drawn).max() + 1e-6
    for i in range(first.shape[1]):
        sums = (first[:, None, i] + second[None, :, i]).reshape(-1, first.shape[-1])
        off = np.abs(drawn[:, None, i] - sums[None]).max(-1)
        if off.min(1).max() > TOLERANCE * np.abs(sums).max() + rounding:
            raise Failure(f"in training, the output follows from no two choices of what {d.rate} drops ({d.drops}), "
                          f"config {sample.config}", by=off.min(1).max())
        found += [divmod(int(j), len(second)) for j in off.argmin(1)]
    for which, rate in zip(np.array(found).T, rates):
        share = 1 - kept[which].mean()
        if abs(share - rate) > FURTHEST[d.drops]:
            raise Failure(f"the share that {d.rate} drops beside another, config {sample.config}", expected=str(rate),
                          got=f"{share:.3f}")
    if d.drops != "all" and (np.array(found)[:, 0] == np.array(found)[:, 1]).all():
        raise Failure(f"{d.rate} drops the same of one as of the other, config {sample.config}")
