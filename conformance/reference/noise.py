"""What methods draw in training, as NumPy draws it: `NOISES`.

No golden can hold what is drawn, but many draws have a mean and covariances, and an implementation's are to be those.
Each `drawn(weights, c, rng)` gives what `formulas.output` takes, `route` or `prompt`, to put one draw into an output;
`weights` are the base model's, without the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from . import store
from .formulas import shared_tensors
from .method import slots
from .methods import lora, monteclora, p_tuning, poly, pvera, shadow, xlora
from .numpy_model import apply_layer, sites


@dataclass(frozen=True)
class Noise:
    method: str
    base: str
    config: dict  # what is not drawn as for the laws
    drawn: Callable
    each: str  # for what there is a draw of its own: a "sample" of a batch, or a "call"
    always: bool = False  # outside training, too
    chosen: Callable = dict  # tensors -> those with which more shows


def of_layers(layer, method):
    """`layer(site, t, c, x, inputs, rng)` -> y, on every layer with tensors of its own."""
    def drawn(weights, c, rng):
        def route(base, folded, tensors, _, inputs):
            tensors = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
            found = {}
            for path, site in sites(base, weights).items():
                if own := slots(tensors, path):
                    t = {**own, **shared_tensors(method, tensors)}
                    found[path] = lambda _, x, site=site, t=t: layer(site, t, c, x, inputs, rng)
            return found

        return {"route": route}

    return drawn


def thinned(x, rate, rng):
    """Dropout of each number, what is kept being divided by its share."""
    return x * (rng.random(x.shape) >= rate) / (1 - rate) if rate else x


def reparametrised(site, t, c, x, inputs, rng):
    """PVeRA, eq. 6: the latent vector is drawn, for every token."""
    h = t["pvera_lambda_d"] * (thinned(x, c.get("pvera_dropout", 0), rng) @ t[pvera.A][:, : site.inp].T)
    mean, log_variance = np.split(h, 2, -1)
    z = mean + np.exp(log_variance / 2) * rng.normal(size=mean.shape)
    return apply_layer(site, x) + t["pvera_lambda_b"] * (z @ t[pvera.B][: site.out].T)


def large_means(tensors):
    """PVeRA's means, beside which the deviations are small."""
    def larger(v):
        return np.concatenate([40 * v[: len(v) // 2], v[len(v) // 2 :]])

    return {k: larger(v) if k.endswith("pvera_lambda_d") else v for k, v in tensors.items()}


def relaxed(site, t, c, x, inputs, rng):
    """Poly: each sample's skills are relaxed Bernoulli numbers, of temperature 1."""
    def mix(t, c, tasks):
        q, s = t[poly.A].shape[:2]
        z = t[poly.LOGITS][tasks].reshape(-1, q, s)
        z = 1 / (1 + np.exp(-z - rng.logistic(size=z.shape)))
        return z / (z.sum(-1, keepdims=True) + poly.EPSILON)

    return poly.run(site, t, c, x, inputs, mix=mix)


def perturbed(site, t, c, x, inputs, rng):
    """MonteCLoRA: A is a mean of perturbed ones, with weights from a logistic normal distribution."""
    A, how = t["lora_A.weight"], c["monteclora_config"]
    r, n = len(A), how["num_samples"]
    deviation = np.sqrt(np.maximum(np.exp(2 * t[monteclora.PRIORS[0]]) * rng.chisquare(r, r), 1e-3))
    a = np.exp(t[monteclora.PRIORS[1]])
    spread = np.sqrt((1 - 2 / n) / a + (1 / a).sum() / n**2)
    w = np.exp(spread * rng.normal(size=n) + np.log(a) - np.log(a).mean())
    change = np.einsum("n,nri->ri", w / w.sum(), rng.normal(size=(n, *A.shape))) * deviation[:, None]
    W, b = lora.formula(site, {**t, "lora_A.weight": A + how.get("sample_scaler", 3e-4) * change}, c)
    return apply_layer(site, x, W, b)


def shadow_thinned(weights, c, rng):
    return {"route": partial(shadow.route, drop=lambda d: thinned(d, c["shadow_dropout"], rng))}


def xlora_thinned(weights, c, rng):
    return {"route": partial(xlora.route, drop=lambda h: thinned(h, c["xlora_dropout_p"], rng))}


def lstm_thinned(weights, c, rng):
    """P-tuning: what one layer of the LSTM gives to the next."""
    encode = partial(p_tuning.encode, drop=lambda h: thinned(h, c["encoder_dropout"], rng))
    return {"prompt": lambda t, c: p_tuning.prompt(t, c, encode=encode)}


UP = {"target_modules": ["up", "mid"]}
MONTE = {"num_samples": 4, "sample_scaler": 0.3, "buffer_size": 7}
DEEP = {"xlora_depth": 3, "xlora_size": 6, "xlora_dropout_p": 0.3, "layerwise_scalings": True}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.4, "num_virtual_tokens": 2,
        "inference_mode": False}
NOISES = (
    Noise("pvera", "mlp-tokens", {"r": 3, **UP}, of_layers(reparametrised, pvera.METHOD), "sample"),
    Noise("pvera", "mlp-tokens", {"r": 4, "pvera_dropout": 0.2, **UP}, of_layers(reparametrised, pvera.METHOD),
          "sample", chosen=large_means),
    Noise("pvera", "mlp-tokens", {"r": 2, "sample_at_inference": True, **UP}, of_layers(reparametrised, pvera.METHOD),
          "sample", always=True),
    Noise("poly", "mlp-tokens", {"r": 2, **UP}, of_layers(relaxed, poly.METHOD), "sample"),
    Noise("poly", "mlp-tokens", {"r": 1, "n_splits": 2, **UP}, of_layers(relaxed, poly.METHOD), "sample"),
    Noise("monteclora", "mlp", {"r": 3, "monteclora_config": MONTE, **UP}, of_layers(perturbed, monteclora.METHOD),
          "call"),
    Noise("shadow", "decoder-three", {"shadow_dropout": 0.3, "shadow_alpha": 0.5}, shadow_thinned, "sample"),
    Noise("xlora", "states", DEEP, xlora_thinned, "sample"),
    Noise("p_tuning", "causal-lm", LSTM, lstm_thinned, "call"),
)


def of(method) -> list[Noise]:
    return [n for n in NOISES if n.method == method.name]


def of_tensors(method) -> bool:
    """Does training draw something, whatever rates of dropout there are?"""
    return any(not any("dropout" in k for k in n.config) for n in of(method))


def drawn(method, weights, config: dict, training: bool, rng) -> dict | None:
    """One draw with this config, for `formulas.output`; None where there is none."""
    whole = {**store.defaults(method.peft_type), **config}
    for noise in of(method):
        rates = [whole[k] for k in noise.config if "dropout" in k]
        if (training or whole.get("sample_at_inference")) and all(rates):
            return noise.drawn(weights, whole, rng)
    return None
