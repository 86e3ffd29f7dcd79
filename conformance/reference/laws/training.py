"""Training mode alone changes nothing, but where a method draws; a step changes what is trained, as its gradient says,
and nothing else."""

import numpy as np

from .. import dropout
from ..compare import Failure

TITLE = "training"
MOST = 1
RATE = 0.1


def applies(method):
    return "inference_mode" not in method.laws.draw


def check(driver, sample):
    still = dropout.NOISY.get(sample.method.name)
    if still is not None:
        if sample.config.get("xlora_depth") != 1:  # one layer has nothing to drop from
            draws(driver, sample)
        sample = sample.on(sample.base_name, **still)
    sample.start(driver)
    out, before = driver.forward(sample.inputs), driver.weights()
    cotangent = np.random.default_rng(sample.seed).normal(size=out.shape)
    gradients = driver.gradients(sample.inputs, cotangent)
    if still != {}:
        driver.train(True)
        sample.same("output in training", driver.forward(sample.inputs), out)
        evaluated, gradients = gradients, driver.gradients(sample.inputs, cotangent)
        for key in gradients if sample.method.name not in dropout.OTHER_GRADIENTS else ():
            sample.same(f"gradient of {key} in training", gradients[key], evaluated[key])
    held = driver.state_dict()
    driver.step(sample.inputs, cotangent, RATE)
    driver.train(False)
    after = driver.state_dict()
    for key, value in held.items():
        moved = value - RATE * gradients[key] if key in gradients else value
        sample.same(f"{key} after a step of training", after[key], moved)
    for name, weight in driver.weights().items():
        if not np.array_equal(weight, before[name]) and not any(k.endswith(f".{name}") for k in gradients):
            raise Failure(f"a step of training changed {name}, which is not trained, config {sample.config}")
    stepped = driver.forward(sample.inputs)
    sample.build(driver)
    driver.load(after)
    sample.same("output after a step, of which a new model with the same tensors has another,", stepped,
                driver.forward(sample.inputs))


def draws(driver, sample):
    sample.start(driver)
    out = driver.forward(sample.inputs)
    driver.train(True)
    drawn = [driver.forward(sample.inputs) for _ in range(3)]
    if any(np.array_equal(y, drawn[0]) for y in drawn[1:]):
        raise Failure(f"outputs in training are equal, where {sample.method.title} draws, config {sample.config}")
    driver.train(False)
    sample.same("output in evaluation after training", driver.forward(sample.inputs), out)
