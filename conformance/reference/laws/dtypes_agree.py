"""The same adapter gives the same numbers in every dtype, within that dtype's rounding.

Where a formula multiplies errors, as decompositions of the base's weights do, so it does with those of rounding: how
much is seen in float64, on the weights and the adapter as the dtype rounds them.
"""

import numpy as np

from ..compare import distance

TITLE = "dtypes agree"
TIMES = 4  # by how much more than rounding what is given, rounding all that follows may move the output


def applies(method):
    return True


def check(driver, sample):
    sample.start(driver, dtype="float64")
    tensors, want = driver.state_dict(), driver.forward(sample.inputs)
    weights = sample.weights
    for dtype in sorted(set(driver.info()["dtypes"]) - {"float64"}):
        sample.build(driver, dtype=dtype)
        driver.load(tensors)
        got = driver.forward(sample.inputs)
        if distance(got, want, dtype) > 1:
            sample.weights = {name: rounded(value, dtype) for name, value in weights.items()}
            sample.build(driver, dtype="float64")
            sample.weights = weights
            driver.load({key: rounded(value, dtype) for key, value in tensors.items()})
            if distance(got, want, dtype) > TIMES * distance(driver.forward(sample.inputs), want, dtype):
                sample.same(f"output in {dtype} against float64", got, want, dtype)


def rounded(a, dtype):
    """The nearest values that a dtype has, integers as they are."""
    a = np.asarray(a)
    if a.dtype.kind != "f" or dtype == "float64":
        return a
    if dtype != "bfloat16":
        return a.astype(dtype).astype(a.dtype)
    bits = a.astype(np.float32).view(np.uint32)
    even = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return even.view(np.float32).astype(a.dtype)
