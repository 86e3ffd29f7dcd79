"""How far apart two arrays are, in units of what rounding allows.

The error of each output row is measured against eps of the dtype times the row's own scale, so a small row beside a
large one is not forgiven. A floor keeps rows of zeros comparable.
"""

from __future__ import annotations

import numpy as np

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
# Rounding errors allowed, in eps of the scale. Widest seen of peft on CPU: 10 in float32, 8 in bfloat16, 12 in float16.
ALLOWED = {"float64": 256.0, "float32": 64.0, "bfloat16": 12.0, "float16": 12.0}


class Failure(Exception):
    """The implementation answered, and the answer is wrong.

    What a search for the cause compares: `what` was computed, and the `values` that came; `floor` as in `distance`.
    """

    def __init__(self, message: str, expected: str = "", got: str = "", by: float | None = None, what: str = "",
                 values=None, floor: float = 1 / 16):
        super().__init__(message)
        self.message, self.expected, self.got, self.by = message, expected, got, by
        self.what, self.values, self.floor = what, values, floor


def rows(a):
    a = np.asarray(a, np.float64)
    return a.reshape(-1, a.shape[-1]) if a.ndim > 1 else a.reshape(1, -1)


def row_errors(got, want, dtype: str, floor: float):
    """The largest error of each row, in tolerances."""
    g, w = rows(got), rows(want)
    scale = np.maximum(np.abs(w).max(1), np.abs(w).max() * floor)
    error = np.abs(g - w).max(1)
    if not scale.all():
        return np.where(error > 0, np.inf, 0.0)
    return error / (scale * EPS[dtype] * ALLOWED[dtype])


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
    return float(row_errors(got, want, dtype, floor).max())


def worst_index(got, want, dtype: str = "float32", floor: float = 1 / 16) -> tuple:
    """Where the error is largest in the row that is furthest off; of what is not finite, the first."""
    if not np.isfinite(got).all():
        return np.unravel_index(int(np.isfinite(got).argmin()), got.shape)
    errors = np.abs(rows(got) - rows(want))
    row = int(row_errors(got, want, dtype, floor).argmax())
    return np.unravel_index(row * errors.shape[1] + int(errors[row].argmax()), got.shape)


def first_difference(got, want, dtype: str = "float32", floor: float = 1 / 16) -> str:
    """Where two arrays differ most, in words."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    at = worst_index(got, want, dtype, floor)
    missing = int((~np.isfinite(got)).sum())
    nothing = f"{missing} of {got.size} values are not finite; " if missing else ""
    return f"{nothing}at {list(map(int, at))}: got {float(got[at]):.9g}, expected {float(want[at]):.9g}"


def around(a, at: tuple, most: int = 6) -> str:
    """The values of a row around an index, and where they stand."""
    *row, place = map(int, at)
    first = min(max(place - most // 2, 0), max(a.shape[-1] - most, 0))
    values = np.asarray(a[tuple(row)])[first : first + most]
    where = ", ".join(map(str, [*row, f"{first}:{first + len(values)}"]))
    return f"{np.array2string(values, precision=7)} at [{where}]"


def close(what, got, want, dtype, also=None, floor=1 / 16):
    """`also`: the other answer of a disputed case."""
    by = distance(got, want, dtype, floor)
    if by > 1 and (also is None or distance(got, also, dtype, floor) > 1):
        got, want = np.asarray(got), np.asarray(want)
        shown = {}
        if got.shape == want.shape and got.ndim:
            at = worst_index(got, want, dtype, floor)
            shown = {"expected": around(want, at), "got": around(got, at)}
        raise Failure(f"{what}: {first_difference(got, want, dtype, floor)} ({by:.3g} tolerances of {dtype})",
                      **shown, by=by, what=what, values=got, floor=floor)
