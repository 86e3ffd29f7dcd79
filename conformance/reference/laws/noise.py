"""What is drawn in training has the mean and the covariances that it is to have, and another call draws anew."""

import numpy as np

from .. import formulas, noise
from ..compare import Failure

TITLE = "noise"
MOST = 1
SAMPLES, CALLS = 1500, 200
FAR = 6.0  # standard errors


def applies(method):
    return bool(noise.of(method))


def check(driver, sample):
    for each in noise.of(sample.method):
        with_noise(each, driver, sample.on(each.base, **each.config))


def with_noise(each, driver, sample):
    method, config = sample.method, sample.config
    if not (live := method.live(config)):
        tensors = each.chosen(sample.start(driver))
        driver.load(tensors)
        live = method.tensors.shared(config, []) if method.route else {}
    else:
        sample.build(driver)
    if not live.keys() <= driver.state_dict().keys():  # a checkpoint does not hold all
        sample.build(driver)
        tensors = {k: 0.6 * sample.rng.normal(size=shape) for k, shape in live.items()}
        driver.assign(tensors)
    one = {k: np.asarray(v)[:1] for k, v in sample.inputs.items()}
    many = {k: np.repeat(v, SAMPLES, 0) for k, v in one.items()}
    rng = np.random.default_rng(sample.seed)
    change = each.drawn(sample.weights, config, rng)

    def expected(inputs):
        return formulas.output(method, sample.base, sample.weights, tensors, config, inputs, **change)

    driver.train(not each.always)
    if each.each == "sample":
        got, want = driver.forward(many), expected(many)
        if np.array_equal(got, driver.forward(many)):
            raise Failure(f"two calls draw the same, config {config}")
    else:
        got = np.concatenate([driver.forward(one) for _ in range(CALLS)])
        want = np.concatenate([expected(one) for _ in range(2 * CALLS)])
    driver.train(False)
    alike(got, want, sample)


def alike(got, want, sample):
    got, want = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (got, want))
    if got.shape[1:] != want.shape[1:]:
        raise Failure("shape of an output", expected=str(want.shape[1:]), got=str(got.shape[1:]))
    centre, scale = want.mean(0), np.abs(want).max()
    upper = np.triu_indices(want.shape[1])
    for what, of in (("mean", lambda a: a), ("covariance", lambda a: a[:, upper[0]] * a[:, upper[1]])):
        a, b = of(got - centre), of(want - centre)
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b)) + 1e-6 * scale
        off = np.abs(a.mean(0) - b.mean(0)) / error
        if off.max() > FAR:
            at = int(off.argmax())
            raise Failure(f"{what} of what {sample.method.title} draws, config {sample.config}",
                          expected=f"{b.mean(0)[at]:.4g}", got=f"{a.mean(0)[at]:.4g}, {off[at]:.1f} errors away")
