"""What a new tensor holds, as a few numbers: values where they are determined, moments where they are drawn.

A description has `shape`, and
- `at`, `square`: some of the values, evenly spaced, and the mean of all squares, where each start gives the same;
- `mean`, `std`, `kurtosis`: of drawn values, and `rows` or `columns`: the square of their length, where these are
  orthogonal and all of one length;
- both where they are drawn by a seed in the config: the values are torch's, the moments anybody's.
"""

from __future__ import annotations

import numpy as np

MOST = 24  # values
FAR = 6.0  # standard deviations of a moment


def places(size: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, MOST)).astype(int))


def moments(a) -> tuple[float, float, float]:
    a = np.asarray(a, np.float64).ravel()
    std = a.std()
    return a.mean(), std, float(((a - a.mean()) ** 4).mean() / std**4 - 3) if std else 0.0


def length(a, axis: int) -> float | None:
    """The square of the length of the rows (axis 0) or columns (1), if they are orthogonal and of one length."""
    a = np.asarray(a, np.float64)
    if a.ndim != 2 or a.shape[axis] < 2 or a.shape[axis] > a.shape[1 - axis]:
        return None
    gram = a @ a.T if axis == 0 else a.T @ a
    size = float(np.diag(gram).mean())
    return size if size and np.abs(gram - size * np.eye(len(gram))).max() < 1e-3 * size else None


def described(starts: list, drawn_by_key: bool, signs: bool) -> dict:
    """The description of a tensor from its values at several starts. `signs`: they are known up to these."""
    first, *others = starts
    found: dict = {"shape": list(first.shape)}
    size = np.abs(first).max() or 1.0
    view = np.abs if signs else np.asarray
    same = all(np.abs(view(o) - view(first)).max() <= (1e-3 if signs else 1e-6) * size for o in others)
    if same:
        flat = view(np.asarray(first, np.float64)).ravel()
        found |= {"at": [float(f"{v:.7g}") for v in flat[places(flat.size)]],
                  "square": float(f"{(flat**2).mean():.7g}")}
    if not same or (drawn_by_key and np.ptp(first)):
        mean, std, kurtosis = moments(np.stack(starts) if not same else first)
        found |= {"mean": float(f"{mean:.5g}"), "std": float(f"{std:.5g}"), "kurtosis": float(f"{kurtosis:.4g}")}
        for name, axis in (("rows", 0), ("columns", 1)):
            lengths = [size for s in starts if (size := length(s, axis)) is not None]
            if len(lengths) == len(starts) and np.ptp(lengths) < 1e-3 * lengths[0]:
                found[name] = float(f"{lengths[0]:.5g}")
    return found


def difference(a, want: dict, signs: bool, torch: bool) -> tuple[str, str, str] | None:
    """(what, expected, got) where a tensor is not as described; None: it is."""
    a = np.asarray(a, np.float64)
    if list(a.shape) != want["shape"]:
        return "shape", str(want["shape"]), str(list(a.shape))
    if not np.isfinite(a).all():
        return "values", "finite numbers", "others"
    if "at" in want and ("std" not in want or torch):
        flat = (np.abs(a) if signs else a).ravel()
        got, wanted = flat[places(flat.size)], np.array(want["at"])
        near = 2e-3 if signs else 1e-5
        if np.abs(got - wanted).max() > near * max(np.abs(wanted).max(), np.sqrt(want["square"])):
            return "values", np.array2string(wanted[:6], precision=6), np.array2string(got[:6], precision=6)
        if abs((flat**2).mean() - want["square"]) > 2 * near * want["square"]:
            return "mean of squares", f"{want['square']:.6g}", f"{(flat**2).mean():.6g}"
        return None
    mean, std, kurtosis = moments(a)
    n, far = a.size, want["kurtosis"]
    if abs(std - want["std"]) > FAR * want["std"] * np.sqrt(max(far + 2, 0.5) / (4 * n)):
        return "standard deviation", f"{want['std']:.4g}", f"{std:.4g}"
    if abs(mean - want["mean"]) > FAR * want["std"] / np.sqrt(n):
        return "mean", f"{want['mean']:.4g}", f"{mean:.4g}"
    constrained = "rows" in want or "columns" in want
    if n >= 700 and not constrained and abs(kurtosis - far) > FAR * np.sqrt(24 / n) * max(1, 1 + far):
        return "excess kurtosis (0: normal, -1.2: uniform)", f"{far:.3g}", f"{kurtosis:.3g}"
    for name, axis in (("rows", 0), ("columns", 1)):
        if name in want and ((found := length(a, axis)) is None or abs(found - want[name]) > 0.01 * want[name]):
            return f"{name}, orthogonal and of a squared length", f"{want[name]:.5g}", "others"
    return None


def drawn(want: dict, rng) -> np.ndarray:
    """Values that are as described."""
    shape = tuple(want["shape"])
    if "at" in want:
        flat = np.zeros(int(np.prod(shape)))
        at, values = places(flat.size), np.array(want["at"])
        rest = flat.size - len(at)
        flat[:] = np.sqrt(max(want["square"] * flat.size - (values**2).sum(), 0) / rest) if rest else 0
        flat[at] = values
        return flat.reshape(shape)
    if "rows" in want or "columns" in want:
        a = np.linalg.qr(rng.normal(size=shape if "columns" in want else shape[::-1]))[0]
        return a * np.sqrt(want["columns"]) if "columns" in want else a.T * np.sqrt(want["rows"])
    if want["kurtosis"] > 1:  # mostly zeros, the others of one size
        share = 1 / (want["kurtosis"] + 3)
        return want["std"] / np.sqrt(share) * (rng.random(shape) < share) * rng.choice([-1, 1], shape)
    if want["kurtosis"] > -0.1:
        return want["mean"] + want["std"] * rng.normal(size=shape)
    several = max(round(-1.2 / want["kurtosis"]), 1)  # a mean of so many uniform numbers has about this kurtosis
    return want["mean"] + want["std"] * np.sqrt(3 * several) * rng.uniform(-1, 1, (several, *shape)).mean(0)
