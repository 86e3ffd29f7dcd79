"""Two active adapters act together, merged as well as running; where they add up, in whatever order they are named."""

TITLE = "several active adapters"
MOST = 4


def applies(method):
    return not method.laws.single and (method.laws.stacks or (method.merges and method.laws.together))


def check(driver, sample):
    sample.start(driver)
    sample.second(driver)
    driver.switch(["default", "other"])
    first = driver.forward(sample.inputs)
    if sample.method.laws.stacks:
        driver.switch(["other", "default"])
        sample.same("output of two adapters in the other order", driver.forward(sample.inputs), first)
    if sample.method.merges:
        driver.merge()
        sample.same("output of two merged adapters", driver.forward(sample.inputs), first)
