"""The merge of (IA)^3: the weight and bias that do alone what the layer and its gains do together."""

from torch import Tensor


def merged(W: Tensor, b: Tensor, gain: Tensor, feedforward: bool) -> tuple[Tensor, Tensor]:
    """(W', b'): of y = gain * (W x + b), and where `feedforward` of y = W (gain * x) + b."""
    raise NotImplementedError("Write it.")
