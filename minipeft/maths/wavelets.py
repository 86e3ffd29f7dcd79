"""The low-pass filters of orthogonal wavelets, by their usual names: db1 to db38, sym2 to sym20, coif1 to coif5.

Daubechies, Ten Lectures on Wavelets, 1992, chapters 6 and 8. A filter of 2 N taps (db<N>, sym<N>) with N vanishing
moments is

    H(z) = (1 + z)^N Q(z), scaled to sum to sqrt(2)       Q has one root z of each pair z, 1 / z with
                                                          z + 1 / z = 2 - 4 y,  sum over k < N of C(N-1+k, k) y^k = 0

db takes all roots inside the unit circle; sym those that make the filter least asymmetric. Coiflets have no such form.
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError

# For sym<N>, N from 2 on: the bits say which groups of roots, from the innermost outwards, are outside the unit circle.
OUTSIDE = [0, 0, 2, 1, 5, 1, 10, 6, 21, 6, 21, 28, 44, 28, 89, 142, 333, 116, 357]
# fmt: off
COIFLETS = {
    1: [
        -0.07273261951252645, 0.33789766245748182, 0.85257202021160039, 0.38486484686485778,
        -0.07273261951252645, -0.015655728135791993,
    ],
    2: [
        0.016387336463203641, -0.041464936786871777, -0.067372554723725595, 0.38611006682276289,
        0.81272363544941351, 0.41700518442323908, -0.076488599078280761, -0.059434418646431092,
        0.02368017194684777, 0.0056114348193688343, -0.0018232088709110323, -0.00072054944552034698,
    ],
    3: [
        -0.0037935128643808019, 0.0077825964256727463, 0.023452696142077168, -0.065771911281469364,
        -0.061123390002972552, 0.40517690240911824, 0.79377722262608719, 0.42848347637737,
        -0.071799821619154838, -0.082301927106299827, 0.034555027573297738, 0.015880544863669452,
        -0.0090079761367306242, -0.0025745176881367972, 0.0011175187708306303, 0.00046621695982040288,
        -7.0983302506379004e-05, -3.4599773197272781e-05,
    ],
    4: [  # PEFT: these 24 numbers, which are not the wavelet: they sum to 1.448, not to sqrt(2)
        0.00089231390253700297, -0.001629492425226786, -0.0073461679362680507, 0.016066782559655206,
        0.026792362270697267, -0.073142904412580728, -0.048770767567913827, 0.42747788393337943,
        0.78424916999145766, 0.43546134221549893, -0.061553658427980801, -0.091765420298398181,
        0.028115659723696829, 0.024945239305530328, -0.010417174666056649, -0.0032702731315608483,
        0.0020166775120449105, 0.00066001129669637825, -0.00017960623150243602, -0.0001598819866911797,
        4.3110389559021745e-05, 1.791447688858775e-05, -2.2414246658720156e-06, -1.5895026298510706e-06,
    ],
    5: [
        -0.000212081862067494, 0.00035857774116175768, 0.0021782943778456947, -0.0041593126275786402,
        -0.010131584846900276, 0.023408322118927783, 0.028169744270532353, -0.091921588060086087,
        -0.052046670253554764, 0.42157126673075435, 0.77429362286032744, 0.43798230665916338,
        -0.06203775157498196, -0.10556315130733723, 0.041287530472117834, 0.032674799467057355,
        -0.019758391600965465, -0.0091595073386761625, 0.0067615202206204169, 0.0024315754425382886,
        -0.0016616273039298788, -0.00063755892612588115, 0.00030185794166824478, 0.00014035632812373243,
        -4.1219861924265501e-05, -2.1270221672515614e-05, 3.7007277113394796e-06, 2.0612203985788783e-06,
        -1.6237995172048338e-07, -9.6040101127678941e-08,
    ],
}
# fmt: on


def taps(family: str) -> int:
    """Length of a family's filters; of coif6 to coif17, too. Raises `ConfigError` for names of no family."""
    match = re.fullmatch(r"(db|sym|coif)([1-9]\d?)", family)
    first, last = {"db": (1, 38), "sym": (2, 20), "coif": (1, 17)}[match[1]] if match else (1, 0)
    if not match or not first <= int(match[2]) <= last:
        names = "db1 to db38, sym2 to sym20, coif1 to coif17"
        raise ConfigError(f"{family!r} is no wavelet family; `wavelet_family` must be one of {names}.")
    return (6 if match[1] == "coif" else 2) * int(match[2])


@torch.compiler.assume_constant_result
def low_pass(family: str) -> tuple[float, ...]:
    """The reconstruction filter of a family, in float64 (from db20 and sym20 on correct to 1e-6 only)."""
    return _low_pass(family)


@functools.cache
def _low_pass(family: str) -> tuple[float, ...]:
    length = taps(family)
    if family.startswith("coif"):
        return tuple(COIFLETS[length // 6])
    N = length // 2
    y = np.roots([float(math.comb(N - 1 + k, k)) for k in reversed(range(N))])
    middle = 1 - 2 * y
    z = middle + np.sqrt(middle * middle - 1 + 0j)
    z = np.where(np.abs(z) < 1, z, 1 / z)
    outside = OUTSIDE[N - 2] if family.startswith("sym") else 0
    roots = [-1.0] * N
    for i, root in enumerate(sorted(z[z.imag > -1e-7], key=abs)):
        root = 1 / root if outside >> i & 1 else root
        roots += [root.real] if abs(root.imag) < 1e-7 else [root, root.conjugate()]
    h = np.ones(1)
    for root in roots:
        h = np.convolve(h, [1, -root])
    return tuple((h.real * math.sqrt(2) / h.real.sum()).tolist())


def inverse_transform(values: Tensor, positions: Tensor, rows: int, columns: int, family: str) -> Tensor:
    """One level of the inverse discrete wavelet transform, (rows + 2 - taps, columns + 2 - taps), of a matrix with
    `values` (n,) at `positions` (2, n) and 0 elsewhere; `rows` and `columns` are even.

    The quarters of that are, row by row: both directions smooth; detail along columns; detail along rows; detail along
    both. Each value adds a patch (taps, taps), two rows and columns from its neighbour's.
    """
    lo = torch.tensor(low_pass(family), dtype=values.dtype, device=values.device)
    hi = lo.flip(0) * torch.tensor([1.0, -1.0], dtype=lo.dtype, device=lo.device).repeat(len(lo) // 2)
    filters, tap, margin = torch.stack([lo, hi]), torch.arange(len(lo), device=lo.device), len(lo) - 2
    (i, j), m, n = positions.long(), rows // 2, columns // 2
    patches = (values[:, None] * filters[j // n])[:, :, None] * filters[i // m][:, None]  # (n, taps, taps)
    i, j = 2 * (i % m)[:, None] + tap, 2 * (j % n)[:, None] + tap  # (n, taps)
    whole = values.new_zeros(rows + margin, columns + margin)
    whole = whole.index_put_((i[:, :, None], j[:, None]), patches, accumulate=True)
    return whole[margin : rows, margin : columns]
