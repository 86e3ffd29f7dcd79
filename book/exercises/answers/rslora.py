"""B A x is a sum of r terms. If these are independent, its size grows like the root of r; so divide by the root."""

from ..rslora import LoraLinear as LoraLinear


class RsLoraLinear(LoraLinear):
    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.scale = alpha / r**0.5
