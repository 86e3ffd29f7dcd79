"""Adding, using and deleting another adapter leaves the first one as it was."""

TITLE = "switch, delete, back"


def applies(method):
    return not method.laws.single


def check(driver, sample):
    sample.start(driver)
    out = driver.forward(sample.inputs)
    sample.second(driver)
    sample.same("output after adding another adapter", driver.forward(sample.inputs), out)
    driver.switch(["other"])
    driver.forward(sample.inputs)
    driver.switch(["default"])
    sample.same("output after switching there and back", driver.forward(sample.inputs), out)
    driver.delete("other")
    sample.same("output after deleting the other adapter", driver.forward(sample.inputs), out)
