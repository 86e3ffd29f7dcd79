"""A batch in which each sample names its own adapter gives what one run per sample gives.

The adapters are of different strength, where there is such a thing.
"""

import numpy as np

TITLE = "mixed batch == one by one"
STRENGTHS = ("lora_alpha", "alpha")


def applies(method):
    return method.laws.mixed_batch


def check(driver, sample):
    sample.start(driver)
    sample.second(driver, **{k: 2 * sample.config[k] + 1 for k in STRENGTHS if k in sample.config})
    names = ["default", "other", None]
    mixed = driver.forward(sample.inputs, adapter_names=names)
    alone = []
    for i, name in enumerate(names):
        driver.disable(name is None)
        driver.switch([name or "default"])
        alone.append(driver.forward(sample.inputs)[i])
    sample.same("mixed batch against one run per adapter", mixed, np.stack(alone))
