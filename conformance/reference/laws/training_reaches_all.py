"""Every trainable tensor gets a finite gradient that is not zero, but those that are idle; where training draws
what depends on them, in training as well."""

import numpy as np

from .. import noise
from ..compare import Failure

TITLE = "gradients reach every trainable tensor"


def applies(method):
    return "inference_mode" not in method.laws.draw


def check(driver, sample):
    sample.start(driver)
    cotangent = np.random.default_rng(sample.seed).normal(size=driver.forward(sample.inputs).shape)
    idle = sample.method.laws.idle or (lambda key, config: False)
    for training in (False, True)[: 1 + noise.of_tensors(sample.method)]:
        driver.train(training)
        for key, g in driver.gradients(sample.inputs, cotangent).items():
            if idle(key, sample.config):
                continue
            if not np.isfinite(g).all() or not np.asarray(g).any():
                raise Failure(f"the gradient of {key} {'in training' * training} is "
                              f"{'zero' if np.isfinite(g).all() else 'not finite'}, config {sample.config}")
