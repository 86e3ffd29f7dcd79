"""torch.randperm on the CPU, in NumPy: the places that a method draws and does not save.

Mersenne Twister 19937 with Knuth's seeding, 32 bits a draw, and a Fisher-Yates shuffle from the front.
"""

from __future__ import annotations

import numpy as np

UNSEEDED = 67280421310721  # what torch.Generator() starts from


def permutation(n: int, seed: int) -> np.ndarray:
    """A permutation of 0 .. n-1."""
    bits = np.random.MT19937()
    bits._legacy_seeding(seed & 0xFFFFFFFF)
    order = np.arange(n)
    for i in range(n - 1):
        j = i + int(bits.random_raw()) % (n - i)
        order[i], order[j] = order[j], order[i]
    return order


def places(rows: int, columns: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of n different entries of a matrix."""
    return np.divmod(permutation(rows * columns, seed)[:n], columns)
