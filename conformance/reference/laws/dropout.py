"""Dropout is absent in evaluation; in training it drops what it is to drop, at the rate of the adapter."""

import numpy as np

from .. import dropout, formulas, numpy_model
from ..compare import Failure
from ..method import slots, turned

TITLE = "dropout"
MOST = 1
CALLS = {"input": 8, "rows": 24, "all": 64, "blocks": 8}
FEWEST = {"input": 10, "rows": 6, "all": 2, "blocks": 2}  # choices that are seen among so many draws
FURTHEST = {"input": 0.1, "rows": 0.15, "all": 0.3}  # of the share that is dropped from the rate: five deviations
TOLERANCE = 1e-4  # of the largest output


def applies(method):
    return bool(dropout.of(method))


def check(driver, sample):
    for d in (d for d in dropout.of(sample.method) if not d.apart):
        target = sample.config["target_modules"][0]
        without = sample.on(sample.base_name, **{**d.more, d.rate: 0.0, "target_modules": [target]})
        one_layer(d, driver, without, target)


def one_layer(d, driver, without, target):
    dropping = without.on(without.base_name, **{d.rate: 0.75 if d.drops == "blocks" else 0.25})
    without.start(driver)
    plain = driver.forward(without.inputs)
    tensors = dropping.start(driver)
    for _ in range(CALLS[d.drops] // 4):
        dropping.same(f"output in evaluation with {d.rate}", driver.forward(dropping.inputs), plain)
    driver.train(True)
    drawn = np.stack([driver.forward(dropping.inputs) for _ in range(CALLS[d.drops])])
    one_of_the_choices(d, dropping, target, tensors, plain, np.asarray(drawn, np.float64))
    driver.train(False)
    dropping.same("output in evaluation after training", driver.forward(dropping.inputs), plain)
    rates_of_two(d, driver, without, dropping, plain)


def rates_of_two(d, driver, without, dropping, plain):
    """One adapter without and one with dropout, in training."""
    without.start(driver)
    driver.train(True)
    dropping.second(driver)
    without.same(f"output in training of an adapter without {d.rate}, beside one with it",
                 driver.forward(without.inputs), plain)
    driver.switch(["other"])
    drawn = [driver.forward(without.inputs) for _ in range(CALLS[d.drops])]
    if all(np.array_equal(y, drawn[0]) for y in drawn):
        raise Failure(f"the second adapter's {d.rate} has no effect, config {dropping.config}")


def one_of_the_choices(d, sample, target, tensors, plain, drawn):
    site, t, config = site_of(sample, target, tensors, plain)
    formula, rate = sample.method.formula, config[d.rate]
    kept = dropout.choices(d, site, t, rate, sample.inputs["x"])

    def given(keep):
        def layer(_, x):
            return dropout.output(d, formula, site, t, config, x, keep)

        return numpy_model.run(sample.base, sample.weights, sample.inputs, {target: layer})

    # tokens, samples of a convolution, or whole calls: what a choice is made for
    count = 1 if d.drops != "input" else len(plain) if site.kernel else int(np.prod(plain.shape[:-1]))
    known = np.stack([given(keep).reshape(count, -1) for keep in kept])
    drawn = drawn.reshape(len(drawn), count, -1)
    off = np.abs(drawn[:, None] - known[None]).max(-1)
    which = off.argmin(1)
    far = off.min(1)
    if far.max() > TOLERANCE * np.abs(known).max():
        at = np.unravel_index(far.argmax(), far.shape)
        raise Failure(f"in training, the output follows from no choice of what {d.rate} drops ({d.drops}), config "
                      f"{config}", expected=str(known[which[at], at[1]][:6]), got=str(drawn[at][:6]), by=far.max())
    if len(np.unique(which)) < FEWEST[d.drops] or (d.drops == "input" and all(len(np.unique(w)) == 1 for w in which)):
        raise Failure(f"in training, {d.rate} drops one of {len(np.unique(which))} choices, config {config}")
    share = 1 - kept[which].mean()
    if abs(share - rate) > FURTHEST.get(d.drops, 1):
        raise Failure(f"the share that {d.rate} drops, config {config}", expected=str(rate), got=f"{share:.3f}")


def site_of(sample, target, tensors, plain):
    """The adapted layer, its tensors by slot, and the config, under that choice of signs which gives `plain`."""
    method, config = sample.method, sample.config
    site = numpy_model.sites(sample.base, sample.weights)[target]

    def off(gauge):
        y = formulas.output(method, sample.base, sample.weights, turned(tensors, gauge), config, sample.inputs)
        return np.abs(y - plain).max()

    gauges = method.tensors.gauges(config, [target]) if method.tensors.gauges else [{}]
    tensors = turned(tensors, min(gauges, key=off))
    return site, {**slots(tensors, target), **formulas.shared_tensors(method, tensors)}, config
