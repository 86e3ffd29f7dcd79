"""An adapter that was just made changes nothing."""

TITLE = "a fresh adapter is the identity"
DRAWS_INITIALISATIONS = True


def applies(method):
    return bool(method.tensors.neutral or method.laws.fresh_identity) and not method.prompt


def check(driver, sample):
    plain = sample.base_output(driver)
    sample.build(driver)
    sample.same("output of a fresh adapter against the base model", driver.forward(sample.inputs), plain)
