"""KappaTune: the layers to adapt are those whose weights are conditioned best, as in PEFT's `KappaTuneSelector`."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-8  # the reference adds it to the smallest singular value


def condition(W) -> float:
    s = np.linalg.svd(np.asarray(W, np.float64), compute_uv=False)
    return s[0] / (s[-1] + EPSILON)


def chosen(base, weights, top_p, max_dim_size_to_analyze=16384, moe_param_suffixes=()) -> dict:
    """The best share `top_p` of all linear layers, at least one, and of the parameters that hold one matrix for each
    expert, by the mean of theirs; larger ones are left out."""
    def best(found):
        return sorted(found, key=lambda name: found[name])[: max(1, int(len(found) * top_p))]

    small = {k: np.asarray(v) for k, v in weights.items() if max(np.shape(v)[-2:]) <= max_dim_size_to_analyze}
    linear = {name: condition(small[f"{name}.weight"]) for name, kind, _ in base["layers"]
              if kind == "Linear" and f"{name}.weight" in small}
    experts = {k: np.mean([condition(W) for W in v]) for k, v in small.items()
               if v.ndim == 3 and k.endswith(tuple(moe_param_suffixes))}
    return {"target_modules": best(linear), "target_parameters": best(experts) if experts else None}
