"""WaveFT: Bilican et al., 2025, https://arxiv.org/abs/2505.12532: upsample, filter, add, cut off the margin.

Filters in closed form, from Daubechies, Ten Lectures on Wavelets, 1992, chapters 6 and 8.
"""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from ..permutation import places

q, p = np.sqrt(10), np.sqrt(5 + 2 * np.sqrt(10))
FILTERS = {
    "db1": np.array([1, 1]) / np.sqrt(2),
    "db2": (np.array([1, 3, 3, 1]) + np.sqrt(3) * np.array([1, 1, -1, -1])) / np.sqrt(32),
    "db3": np.array([1 + q + p, 5 + q + 3 * p, 10 - 2 * q + 2 * p, 10 - 2 * q - 2 * p, 5 + q - 3 * p, 1 + q - p])
    / np.sqrt(512),
    "coif1": (np.array([1, 5, 14, 14, 1, -3]) + np.sqrt(7) * np.array([-1, 1, 2, -2, -1, 1])) / np.sqrt(512),
}
FILTERS["sym2"], FILTERS["sym3"] = FILTERS["db2"], FILTERS["db3"]


def count(site, c):
    patterns = c.get("n_frequency_pattern") or {}
    if c.get("proportional_parameters"):  # of the layers 6 -> 10 and 10 -> 10
        return round(site.W.size / 160 * 2 * c["n_frequency"])
    return next((n for key, n in patterns.items() if ("." + site.path).endswith("." + key)), c["n_frequency"])


def shapes(site, c):
    return {"waveft_spectrum": (count(site, c),)}


def synthesis(lo, n, sign=-1):
    """The matrices that take n smooth or n detail coefficients of a line to its 2 n + 2 - taps values."""
    hi = lo[::-1] * np.where(np.arange(len(lo)) % 2, sign, 1)
    cut = slice(len(lo) - 2, 2 * n)
    found = []
    for f in (lo, hi):
        columns = []
        for unit in np.eye(n):
            spread = np.zeros(2 * n - 1)
            spread[::2] = unit
            columns.append(np.convolve(spread, f)[cut])
        found.append(np.array(columns).T)
    return found


def delta(site, t, c, swap=False, sign=-1, lo=None):
    m, n = site.W.shape
    rows, columns = places(m, n, count(site, c), c.get("random_loc_seed", 777))
    if not c.get("use_idwt", True):
        D = np.zeros((m, n))
        D[rows, columns] = t["waveft_spectrum"]
        return c.get("scaling", 25.0) * D
    lo = FILTERS[c.get("wavelet_family", "db1")] if lo is None else lo
    margin = len(lo) - 2
    h, w = (m + margin + 1) // 2, (n + margin + 1) // 2
    S = np.zeros((2 * h, 2 * w))
    S[rows + margin // 2, columns + margin // 2] = t["waveft_spectrum"]
    (L, H), (l, k) = synthesis(lo, h, sign), synthesis(lo, w, sign)
    right, left = (L, k), (H, l)  # detail along the columns' direction, along the rows'
    right, left = (right, left) if swap else ((H, l), (L, k))
    D = L @ S[:h, :w] @ l.T + H @ S[h:, w:] @ k.T
    D = D + right[0] @ S[:h, w:] @ right[1].T + left[0] @ S[h:, :w] @ left[1].T
    return c.get("scaling", 25.0) * D[:m, :n]


def formula(site, t, c):
    return site.W + delta(site, t, c), site.b


def wave(family="db1", **more):
    return {"n_frequency": 20, "wavelet_family": family, "scaling": 3.0, "target_modules": ["up", "mid"], **more}


PLAIN = "linear/no-transform"
ROUNDED, NOTE = ("float32", "bfloat16"), "the filter in the reference's table is off by up to 4e-12"
TAPS = ("linear/db2", "linear/sym3", "linear/coif1", "conv1d-hf/db2")
ROWS = [
    Row("linear/plain", "mlp", wave(), "core", second={}),
    Row("linear/db2", "mlp-tokens", wave("db2"), "core"),
    Row("linear/db3", "mlp", wave("db3"), dtypes=ROUNDED, note=NOTE),
    Row("linear/sym2", "mlp-nobias", wave("sym2", random_loc_seed=5), dtypes=ROUNDED, note=NOTE),
    Row("linear/sym3", "mlp", wave("sym3"), dtypes=ROUNDED, note=NOTE),
    Row("linear/coif1", "mlp", wave("coif1"), "core"),
    Row("linear/no-transform", "mlp", wave(use_idwt=False)),
    Row("linear/pattern", "blocks", wave(target_modules=["q_proj", "v_proj"], n_frequency_pattern={
        "0.q_proj": 7, "v_proj": 30})),
    Row("linear/proportional", "mlp", wave(proportional_parameters=True)),
    Row("linear/proportional-more", "mlp", wave(n_frequency=21, proportional_parameters=True)),
    Row("linear/modules-to-save", "mlp", wave(modules_to_save=["head"])),
    Row("conv1d-hf/db2", "gpt", wave("db2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
]


def filtered(change):
    return {"formula": lambda s, t, c: (s.W + delta(s, t, c, lo=change(FILTERS[c.get("wavelet_family", "db1")])), s.b)}


FAULTS = (
    Fault("quarters-swapped", "the two mixed quarters are taken for each other", spares=(PLAIN,),
          change={"formula": lambda s, t, c: (s.W + delta(s, t, c, swap=True), s.b)}),
    Fault("filter-reversed", "the analysis filter in place of the synthesis filter", filtered(lambda f: f[::-1]),
          cases=TAPS),
    Fault("filter-unscaled", "the filter sums to 1", filtered(lambda f: f / np.sqrt(2)), spares=(PLAIN,)),
    Fault("high-pass-sign", "the high-pass filter has no alternating signs", spares=(PLAIN,),
          change={"formula": lambda s, t, c: (s.W + delta(s, t, c, sign=1), s.b)}),
    Fault("transform-forgotten", "the coefficients are the delta",
          {"formula": lambda s, t, c: formula(s, t, {**c, "use_idwt": False})}, spares=(PLAIN,)),
)

METHOD = Method(
    name="waveft", peft_type="WAVEFT", title="WaveFT", paper="https://arxiv.org/abs/2505.12532",
    equation="W' = W + s IDWT(S)", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"waveft_spectrum": 0.0}),
    laws=Laws(draw={"n_frequency": [1, 20], "wavelet_family": ["db1", "db2", "coif1"],
                    "target_modules": [["up", "mid"]]}, mixed_batch=True),
)
