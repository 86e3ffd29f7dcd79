"""There is a fault in this DoRA. It trains, it merges, and on most layers it does not even raise. Find it."""

from torch import Tensor


def weight(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """W' = m * (W + s B A) / |W + s B A|, with a magnitude and a norm for each output."""
    V = W + scale * B @ A
    return m[:, None] * V / V.norm(dim=0, keepdim=True)


def start(W: Tensor) -> Tensor:
    """The magnitudes with which a new adapter changes nothing."""
    return W.norm(dim=0)
