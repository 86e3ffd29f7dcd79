"""Each sample's output depends on that sample alone."""

import numpy as np

TITLE = "samples are independent"


def applies(method):
    return not method.laws.whole_batch


def check(driver, sample):
    sample.start(driver)
    out = driver.forward(sample.inputs)
    one_by_one = [driver.forward({k: v[i:i + 1] for k, v in sample.inputs.items()})[0] for i in range(len(out))]
    sample.same("a batch against its samples one by one", out, np.stack(one_by_one))
