"""What a model with Uni-LoRA adapters offers besides."""

from __future__ import annotations

from ..maths.draw import balanced_indices
from ..model.tuner import BaseTuner


class UniLoraModel(BaseTuner, method="UNILORA"):
    """A model with Uni-LoRA adapters."""

    generate_index = staticmethod(balanced_indices)
