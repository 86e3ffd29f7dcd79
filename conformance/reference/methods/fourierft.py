"""FourierFT: Gao et al., 2024, https://arxiv.org/abs/2405.03003, eq. 2 to 4, as a sum of plane waves."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from ..permutation import places


def count(site, c):
    patterns = c.get("n_frequency_pattern") or {}
    return next((n for key, n in patterns.items() if ("." + site.path).endswith("." + key)), c["n_frequency"])


def shapes(site, c):
    return {"fourierft_spectrum": (count(site, c),)}


def delta(site, t, c, sign=1, swap=False):
    m, n = site.W.shape
    rows, columns = places(m, n, count(site, c), c.get("random_loc_seed", 777))
    if swap:
        rows, columns = columns % m, rows % n
    i, j = np.arange(m)[:, None, None], np.arange(n)[None, :, None]
    waves = np.exp(sign * 2j * np.pi * (i * rows / m + j * columns / n))  # (m, n, entries)
    return c.get("scaling", 150.0) / (m * n) * (waves @ t["fourierft_spectrum"])


def formula(site, t, c):
    return site.W + delta(site, t, c).real, site.b


def fourier(**more):
    return {"n_frequency": 20, "scaling": 30.0, "target_modules": ["up", "mid"], **more}


ROUNDED = ("float32", "bfloat16")
NOTE = "the reference transforms in float32 whatever the dtype"
ROWS = [
    Row("linear/plain", "mlp", fourier(), "core", second={}, dtypes=ROUNDED, note=NOTE),
    Row("linear/seed", "mlp-tokens", fourier(random_loc_seed=5), "core", dtypes=ROUNDED, note=NOTE),
    Row("linear/pattern", "blocks", fourier(target_modules=["q_proj", "v_proj"], n_frequency_pattern={
        "0.q_proj": 7, "v_proj": 30}, scaling=4.0), dtypes=ROUNDED, note=NOTE),
    Row("linear/init-true", "mlp-nobias", fourier(init_weights=True), dtypes=ROUNDED, note=NOTE),
    Row("linear/modules-to-save", "mlp", fourier(modules_to_save=["head"]), dtypes=ROUNDED, note=NOTE),
    Row("conv1d-hf/plain", "gpt", fourier(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core",
        dtypes=ROUNDED, note=NOTE),
]

FAULTS = (
    Fault("imaginary-part", "the sine part is taken", {"formula": lambda s, t, c: (s.W + delta(s, t, c).imag, s.b)}),
    Fault("orthonormal", "the transform is scaled by 1 / sqrt(out in)",
          {"formula": lambda s, t, c: (s.W + delta(s, t, c).real * np.sqrt(s.W.size), s.b)}),
    Fault("rows-for-columns", "places are read the other way round",
          {"formula": lambda s, t, c: (s.W + delta(s, t, c, swap=True).real, s.b)}),
    Fault("scaling-ignored", "the scaling is left out",
          {"formula": lambda s, t, c: formula(s, t, {**c, "scaling": 1.0})}),
    Fault("other-seed", "the seed is not the config's",
          {"formula": lambda s, t, c: formula(s, t, {**c, "random_loc_seed": 0})}),
)

METHOD = Method(
    name="fourierft", peft_type="FOURIERFT", title="FourierFT", paper="https://arxiv.org/abs/2405.03003",
    equation="W' = W + s Re(IDFT(S))", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"fourierft_spectrum": 0.0}),
    laws=Laws(draw={"n_frequency": [1, 20], "init_weights": [True], "target_modules": [["up", "mid"]]},
              mixed_batch=True),
)
