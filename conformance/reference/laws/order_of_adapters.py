"""Two active adapters add up, in whatever order they are named; merged, they give the same."""

TITLE = "order of active adapters"


def applies(method):
    return method.laws.stacks


def check(driver, sample):
    sample.start(driver)
    sample.second(driver)
    driver.switch(["default", "other"])
    first = driver.forward(sample.inputs)
    driver.switch(["other", "default"])
    sample.same("output of two adapters in the other order", driver.forward(sample.inputs), first)
    if sample.method.merges:
        driver.merge()
        sample.same("output of two merged adapters", driver.forward(sample.inputs), first)
