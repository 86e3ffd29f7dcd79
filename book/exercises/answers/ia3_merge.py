"""A gain behind the layer scales each row of W and each entry of b; before it, each column of W, and b not at all."""


def merged(W, b, gain, feedforward):
    if feedforward:
        return W * gain, b
    return gain[:, None] * W, gain * b
