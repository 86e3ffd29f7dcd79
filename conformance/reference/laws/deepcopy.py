"""A deep copy is the same model."""

TITLE = "deep copy"


def applies(method):
    return True


def check(driver, sample):
    sample.start(driver)
    out = driver.forward(sample.inputs)
    driver.copy()
    sample.same("output of a deep copy", driver.forward(sample.inputs), out)
    if sample.method.merges:
        driver.merge()
        sample.same("output of a merged deep copy", driver.forward(sample.inputs), out)
