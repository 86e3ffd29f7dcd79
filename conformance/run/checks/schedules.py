"""What is left of an adapter in training, step by step: AdaLoRA's ranks, AdaMSS's subspaces."""

from __future__ import annotations

import numpy as np

from ...reference import formulas
from ...reference.compare import Failure, close
from ...reference.draw import rng_of
from .bookkeeping import trained
from .goldens import load_drawn, same_set

RANKS: tuple[dict, ...] = (
    {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 6}, {"tinit": 3, "tfinal": 2, "deltaT": 2, "total_step": 15},
    {"tinit": 1, "tfinal": 4, "deltaT": 3, "total_step": 12})


SMOOTHING = {"beta1": 0.85, "beta2": 0.85}


def schedule(driver, case, method):
    """How many singular values are left after each step, of all layers together: a cubic between two numbers."""
    base, inputs, ranks = case.tensors("base"), case.tensors("input"), {"init_r": 6, "target_r": 2}
    for times in RANKS:
        rng = rng_of(f"schedule {times}")
        driver.build(case.base, base, {**case.config, **ranks, **SMOOTHING, **times}, "float32",
                     case=f"{method.name}/schedule")
        driver.load({k: rng.normal(size=v.shape).astype(np.float32) for k, v in sorted(driver.state_dict().items())})
        shape, layers = driver.forward(inputs).shape, len(case.config["target_modules"])
        first, last = (layers * ranks[k] for k in ranks)
        start, end = times["tinit"], times["total_step"] - times["tfinal"]
        driver.train(True)
        left = first
        for step in range(1, times["total_step"] + 1):
            driver.step(inputs, rng.normal(size=shape), 1e-3)
            driver.allocate(step)
            if step == end or (start < step < end and step % times["deltaT"] == 0):
                left = int(last + (first - last) * (1 - (step - start) / (end - start)) ** 3)
            got = sum(np.count_nonzero(v) for k, v in driver.state_dict().items() if k.endswith("lora_E"))
            if got != left:
                raise Failure(f"singular values that are left after step {step} of {times}", str(left), str(got))


SUBSPACES: tuple[dict, ...] = (
    {"init_warmup": 1, "final_warmup": 6, "mask_interval": 1, "asa_target_subspaces": 2, "asa_schedule_exponent": 3.0,
     "asa_importance_beta": 0.85, "asa_uncertainty_beta": 0.85},
    {"init_warmup": 2, "final_warmup": 6, "mask_interval": 2, "asa_target_subspaces": 3, "asa_schedule_exponent": 1.0,
     "asa_importance_beta": 0.3, "asa_uncertainty_beta": 0.6},
    {"init_warmup": 2, "final_warmup": 6, "mask_interval": 2, "asa_target_subspaces": 2, "asa_schedule_exponent": 1.0,
     "asa_importance_beta": 0.3, "asa_uncertainty_beta": 0.6})
RATE, STEPS = 0.05, 8


def subspaces(driver, case, method):
    """Which subspaces are trained after each step, of all layers together, and what is trained with them."""
    base, inputs = case.tensors("base"), case.tensors("input")
    for times in SUBSPACES:
        rng, config = rng_of(f"subspaces {times}"), {**case.config, **times}
        driver.build(case.base, base, config, "float32", case=case.id)
        tensors = load_drawn(driver, method, rng)
        tensors = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
        chosen, shape = method.budget.allocator(config, tensors), driver.forward(inputs).shape
        for step in range(STEPS):
            cotangent = rng.normal(size=shape)
            found = driver.live_gradients(inputs, cotangent)
            gradients = {k.replace(".default", ""): np.asarray(v, np.float64) for k, v in found.items()}
            driver.step(inputs, cotangent, RATE)
            driver.allocate(step)
            tensors = {k: v - RATE * gradients.get(k, 0) for k, v in tensors.items()}
            chosen.step(tensors, gradients, step)
            want = [k for k in trained(case.parameters) if chosen.kept[k.replace(".default", "")]]
            same_set(f"what is trained after step {step} of {times}", trained(driver.names()), want)
        close(f"output after these steps, {times}", driver.forward(inputs),
              formulas.output(method, case.base, base, tensors, config, inputs), "float32")
