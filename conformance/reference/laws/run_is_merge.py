"""Running an adapter equals merging it."""

TITLE = "running == merging"


def applies(method):
    return method.merges


def check(driver, sample):
    sample.start(driver)
    running = driver.forward(sample.inputs)
    driver.merge()
    sample.same("merged output against running output", driver.forward(sample.inputs), running)
