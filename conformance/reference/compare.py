"""How far apart two arrays are, in units of what rounding allows.

The error of each output row is measured against eps of the dtype times the row's own scale, so a small row beside a
large one is not forgiven. A floor keeps rows of zeros comparable.
"""

from __future__ import annotations

import numpy as np

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}
# Rounding errors allowed, in eps of the scale. Widest seen of peft on CPU: 10 in float32, 8 in bfloat16.
ALLOWED = {"float64": 256.0, "float32": 64.0, "bfloat16": 12.0}


class Failure(Exception):
    """The implementation answered, and the answer is wrong."""

    def __init__(self, message: str, expected: str = "", got: str = "", by: float | None = None):
        super().__init__(message)
        self.message, self.expected, self.got, self.by = message, expected, got, by


def rows(a):
    a = np.asarray(a, np.float64)
    return a.reshape(-1, a.shape[-1]) if a.ndim > 1 else a.reshape(1, -1)


def distance(got, want, dtype: str, floor: float = 1 / 16) -> float:
    """The largest error over all rows, in tolerances; at most 1 is a pass. Infinite on a wrong shape or a NaN.

    `floor`: the least scale of a row, as a share of the tensor's largest value. Gradients are sums whose terms cancel,
    so they are measured with 1: against the tensor's largest value.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    if want.size == 0:
        return 0.0
    g, w = rows(got), rows(want)
    scale = np.maximum(np.abs(w).max(1), np.abs(w).max() * floor)
    error = np.abs(g - w).max(1)
    if not scale.all():
        return 0.0 if not error.any() else float("inf")
    return float((error / (scale * EPS[dtype] * ALLOWED[dtype])).max())


def first_difference(got, want) -> str:
    """Where two arrays differ most, in words."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not np.isfinite(got).all():
        return f"{int((~np.isfinite(got)).sum())} of {got.size} values are not finite"
    error = np.abs(np.asarray(got, np.float64) - want)
    at = np.unravel_index(error.argmax(), error.shape)
    return f"at {list(map(int, at))}: got {float(got[at]):.9g}, expected {float(want[at]):.9g}"


def close(what, got, want, dtype, also=None, floor=1 / 16):
    """`also`: the other answer of a disputed case."""
    by = distance(got, want, dtype, floor)
    if by > 1 and (also is None or distance(got, also, dtype, floor) > 1):
        shown = np.array2string(np.asarray(want).ravel()[:6], precision=7)
        raise Failure(f"{what}: {first_difference(got, want)} ({by:.3g} tolerances of {dtype})",
                      expected=shown, got=np.array2string(np.asarray(got).ravel()[:6], precision=7), by=by)
