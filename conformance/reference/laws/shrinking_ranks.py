"""Ranks shrink in training as the paper says, a checkpoint holds what is left, and the loss has its further term."""

import tempfile

import numpy as np

from .. import formulas
from ..compare import Failure

TITLE = "shrinking ranks"
MOST = 1
STEPS, RATE = 9, 0.05
SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": STEPS, "beta1": 0.9,
            "beta2": 0.2, "target_modules": ["up", "mid", "low"]}


def applies(method):
    return method.budget is not None and method.budget.pruned is not None


def check(driver, sample):
    sample = sample.on("names", **SCHEDULE)
    tensors = {k: np.asarray(v, np.float64) for k, v in sample.start(driver).items()}
    allocator = sample.method.budget.allocator(sample.config, tensors)
    shape, rng = driver.forward(sample.inputs).shape, np.random.default_rng(sample.seed)
    driver.train(True)
    for step in range(1, STEPS + 1):
        cotangent = rng.normal(size=shape) * rng.choice([0.2, 1.0])
        found = driver.live_gradients(sample.inputs, cotangent)
        gradients = {k.removesuffix(".default"): np.asarray(v, np.float64) for k, v in found.items()}
        driver.step(sample.inputs, cotangent, RATE)
        driver.allocate(step)
        tensors = {k: v - RATE * gradients[k] for k, v in tensors.items()}
        tensors = allocator.step(tensors, gradients, step)
        compare(driver, sample, f"after step {step}", tensors, allocator.kept)
    driver.train(False)
    held = driver.state_dict()
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, sample.base, sample.weights, sample.dtype)
        driver.load_adapter(path, "again")
    compare(driver, sample, "saved and loaded", tensors, allocator.kept)
    for key, value in driver.state_dict().items():
        if not np.array_equal(value, held[key]):
            raise Failure(f"{key} is not what was saved, config {sample.config}")
    driver.switch(["again"])
    compare(driver, sample, "loaded under another name", tensors, allocator.kept, "again")
    further_term(driver, sample)


def compare(driver, sample, when, tensors, kept, name="default"):
    got, want = driver.state_dict(name), sample.method.budget.pruned(tensors, kept)
    for key, value in want.items():
        if got[key].shape != value.shape:
            raise Failure(f"{when}: the shape of {key}, config {sample.config}", expected=str(value.shape),
                          got=str(got[key].shape))
        sample.same(f"{when}: {key}", got[key], value)
    y = formulas.output(sample.method, sample.base, sample.weights, tensors, sample.config, sample.inputs)
    sample.same(f"{when}: output", driver.forward(sample.inputs), y)


def further_term(driver, sample):
    for weight in (0.0, 0.75):
        one = sample.on("causal-lm", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", orth_reg_weight=weight)
        ids = one.inputs["input_ids"]
        inputs = {**one.inputs, "labels": np.random.default_rng(one.seed).permutation(ids)}
        tensors = one.start(driver)
        loss = formulas.output(one.method, one.base, one.weights, tensors, one.config, inputs)
        one.same("the loss", driver.forward(inputs), loss)
