"""A method of your own: y = W (g * x) + b + s, a gain for each input and a shift for each output.

Derive its adapter from one of the kinds in `minipeft.core.adapter`. Running, merging, unmerging, mixed batches, saving
and loading then work by themselves.
"""

from dataclasses import dataclass

from minipeft.core.adapter import Activation
from minipeft.core.config import PeftConfig


@dataclass
class GainShiftConfig(PeftConfig, method="GAIN_SHIFT"):
    """Fields of the method."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None


class GainShift(Activation, config=GainShiftConfig):
    prefix = "gainshift_"

    def build(self) -> None:
        """Create the parameters `gainshift_g` (in,) and `gainshift_s` (out,), so that a new adapter does nothing."""
        raise NotImplementedError("Write it, and what acts on the input and on the output.")
