"""FourierFT - Parameter-Efficient Fine-Tuning with Discrete Fourier Transform.
Gao et al., 2024, https://arxiv.org/abs/2405.03003, eq. 2 to 4.

    W' = W + s Re(F^-1(S))       S: (out, in), 0 but for n entries c: (n,), at places that the seed gives
                                 F^-1: inverse discrete Fourier transform in two dimensions, with its 1 / (out in)
    parameters                   n_frequency
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Delta, Rows
from ..core.config import PeftConfig, Positive
from ..core.errors import ConfigError
from ..core.targets import pattern_value
from ..maths.sparse import random_positions


@dataclass
class FourierFTConfig(PeftConfig, method="FOURIERFT", layers_need_list=True):
    """Fields of FourierFT."""

    n_frequency: Positive = 1000  # entries of the spectrum, for each layer
    scaling: float = 150.0
    random_loc_seed: int | None = 777  # where they stand; not saved with the tensors, so it is needed to load them
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: Literal["none", "all", "fourier_only"] = "none"  # which of the model's own biases are trained
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, Positive] | None = field(default_factory=dict)  # by path or regular expression
    init_weights: bool = False  # True: zeros; otherwise standard normal

    def __post_init__(self):
        super().__post_init__()
        if self.random_loc_seed is None:
            raise ConfigError("`random_loc_seed` must be a number: without it a saved adapter cannot be loaded.")


class FourierFT(Delta, config=FourierFTConfig):
    prefix = "fourierft_"

    def build(self) -> None:
        c = self.config
        n = self.fourierft_n_frequency = pattern_value(c.n_frequency_pattern, self.path, c.n_frequency)
        self.fourierft_scaling, self.fourierft_random_loc_seed = c.scaling, c.random_loc_seed
        self.indices = random_positions(self.base, n, c.random_loc_seed)
        values = torch.randn(n)
        self.fourierft_spectrum = nn.Parameter(torch.zeros_like(values) if c.init_weights else values)

    def spectrum(self, dtype: torch.dtype = torch.float32) -> Tensor:
        c = self.fourierft_spectrum
        wide = c.to(torch.promote_types(c.dtype, dtype))  # PEFT: always float32
        return half_spectrum(wide * self.fourierft_scaling, self.indices.long(), *self.base.shape)  # (out, in / 2 + 1)

    def delta(self) -> Tensor:
        return torch.fft.irfft2(self.spectrum(), self.base.shape).to(self.fourierft_spectrum.dtype)  # (out, in)

    def delta_rows(self) -> Rows:
        S, n = self.spectrum(torch.complex64), self.base.in_features
        for columns in S.split(len(S) // 32 + 1, 1):
            columns.copy_(torch.fft.ifft(columns, dim=0))
        return lambda rows: torch.fft.irfft(S[rows], n)


def half_spectrum(values: Tensor, positions: Tensor, m: int, n: int) -> Tensor:
    """The columns 0 .. n / 2 of the spectrum (m, n) whose transform is Re(F^-1(S)), for S with real `values`.

    An entry at (u, v) and one at (-u, -v) have the same real part, and the columns that are left out mirror these:
    half as much to compute as with the whole of S, and less than half of the memory.
    """
    u, v = positions
    mirrored = v > n // 2
    u, v = torch.where(mirrored, -u % m, u), torch.where(mirrored, n - v, v)
    single = (v == 0) | (2 * v == n)  # columns that are their own mirror, of which irfft takes the real part
    S = values.new_zeros(m, n // 2 + 1)
    return S.index_put_((u, v), torch.where(single, values, values / 2), accumulate=True)
