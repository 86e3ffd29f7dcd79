"""As the law of dropout, on a convolution of which a whole sample has few entries."""

from .. import dropout
from .dropout import one_layer

TITLE = "dropout in convolutions"
MOST = 1


def applies(method):
    return any(d.convolutions for d in dropout.of(method))


def check(driver, sample):
    for d in dropout.of(sample.method):
        if d.convolutions:
            without = sample.on("conv2d-small", **{**d.more, d.rate: 0.0, "target_modules": ["c1"]})
            one_layer(d, driver, without, "c1")
