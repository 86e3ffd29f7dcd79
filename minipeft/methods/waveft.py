"""WaveFT - Wavelet Fine-Tuning. Bilican et al., 2025, https://arxiv.org/abs/2505.12532.

    W' = W + s D(S)              S: (out, in), 0 but for n entries c: (n,), at places that the seed gives
                                 D: one level of the inverse wavelet transform in two dimensions (wavelets.py);
                                 S has a margin of zeros, the taps of the filter less 2, that the transform uses up
    W' = W + s S                 without `use_idwt`
    parameters                   n_frequency
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Delta
from ..core.bases import Base
from ..core.config import PeftConfig, Positive
from ..core.errors import ConfigError
from ..core.targets import pattern_value
from ..maths.sparse import dense, random_positions
from ..maths.wavelets import COIFLETS, inverse_transform, taps


@dataclass
class WaveFTConfig(PeftConfig, method="WAVEFT", layers_need_list=True):
    """Fields of WaveFT. Families: db1 to db38, sym2 to sym20, coif1 to coif5 (to coif17 without `use_idwt`)."""

    n_frequency: Positive = 2592  # entries of S, for each layer
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777  # where the entries stand; not saved with the tensors, so it is needed to load them
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: Literal["none", "all", "waveft_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, Positive] | None = field(default_factory=dict)  # by path or regular expression
    proportional_parameters: bool = False  # n_frequency is the mean: larger layers get more, by the size of W
    init_weights: bool = True  # zeros; otherwise normal, std 0.01

    def __post_init__(self):
        super().__post_init__()
        length = taps(self.wavelet_family)
        if self.use_idwt and self.wavelet_family.startswith("coif") and length // 6 not in COIFLETS:
            raise ConfigError(f"`wavelet_family` is {self.wavelet_family!r}, but `use_idwt` knows only coif1 to coif5.")


class WaveFT(Delta, config=WaveFTConfig):
    prefix = "waveft_"

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        if not config.proportional_parameters:
            return {}
        entries = sum(base.in_features * base.out_features for _, base in found)
        return {"adapted_weights": torch.tensor([entries, len(found)])}

    def build(self) -> None:
        c = self.config
        n = pattern_value(c.n_frequency_pattern, self.path, c.n_frequency)
        if c.proportional_parameters:
            entries, layers = self.adapted_weights.tolist()
            n = max(1, round(self.base.in_features * self.base.out_features / entries * (c.n_frequency * layers)))
        self.waveft_n_frequency, self.waveft_scaling, self.waveft_random_loc_seed = n, c.scaling, c.random_loc_seed
        self.waveft_wavelet_family, self.waveft_use_idwt = c.wavelet_family, c.use_idwt
        self.waveft_indices = random_positions(self.base, n, c.random_loc_seed)
        self.waveft_spectrum = nn.Parameter(torch.zeros(n) if c.init_weights else torch.randn(n) * 0.01)

    @classmethod
    def is_saved(cls, slot: str, config: Any) -> bool:
        return slot == "waveft_spectrum"

    def delta(self) -> Tensor:
        c, m, n = self.waveft_spectrum, self.base.out_features, self.base.in_features
        c, dtype = self.waveft_scaling * c.to(torch.promote_types(c.dtype, torch.float32)), c.dtype
        if not self.waveft_use_idwt:
            return dense(c, self.waveft_indices, m, n).to(dtype)  # (out, in)
        margin = taps(self.waveft_wavelet_family) - 2
        rows, columns = m + margin + m % 2, n + margin + n % 2
        places = self.waveft_indices + margin // 2
        return inverse_transform(c, places, rows, columns, self.waveft_wavelet_family)[:m, :n].to(dtype)
