"""With adapters disabled, the base model's own output comes out, and enabling brings the adapter back."""

TITLE = "disabled == base"


def applies(method):
    return True


def check(driver, sample):
    plain = sample.base_output(driver)
    sample.start(driver)
    adapted = driver.forward(sample.inputs)
    driver.disable(True)
    sample.same("output while disabled", driver.forward(sample.inputs), plain)
    driver.disable(False)
    sample.same("output when enabled again", driver.forward(sample.inputs), adapted)
