"""The same adapter gives the same numbers in every dtype, within that dtype's rounding."""

TITLE = "dtypes agree"


def applies(method):
    return True


def check(driver, sample):
    sample.start(driver, dtype="float64")
    tensors, want = driver.state_dict(), driver.forward(sample.inputs)
    for dtype in set(driver.info()["dtypes"]) - {"float64"}:
        sample.build(driver, dtype=dtype)
        driver.load(tensors)
        sample.same(f"output in {dtype} against float64", driver.forward(sample.inputs), want, dtype)
