"""X-LoRA: Buehler and Buehler, 2024, https://arxiv.org/abs/2402.07148: LoRA adapters, weighed anew for every token.

The adapters are checkpoints of their own, in `fixtures/adapters/xlora`: "adapters" in a config names them from
`fixtures` on. What is trained and saved is the classifier, which reads the last hidden states of a first pass.
"""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from .. import numpy_model
from ..method import KEY, Fault, Laws, Method, Row, Tensors

CLASSIFIER = "base_model.internal_xlora_classifier.layers"
LORAS = {  # name -> (config, {path: (out, in)}); an embedding's W is (dim, tokens)
    "both": ({"r": 2, "lora_alpha": 3, "target_modules": ["up", "mid"]}, {"up": (10, 6), "mid": (10, 10)}),
    "square": ({"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["mid"]}, {"mid": (10, 10)}),
    "wide": ({"r": 1, "lora_alpha": 2, "target_modules": ["up"]}, {"up": (10, 6)}),
    "words": ({"r": 2, "lora_alpha": 3, "target_modules": ["emb", "mid"]}, {"emb": (6, 12), "mid": (10, 6)}),
    "emb": ({"r": 3, "lora_alpha": 2, "target_modules": ["emb"]}, {"emb": (6, 12)}),
}


def files(folder):
    """Write the LoRA adapters, each drawn from its name."""
    from safetensors.numpy import save_file

    from ..draw import bf16, rng_of

    for name, (config, shapes) in LORAS.items():
        rng, tensors = rng_of(f"xlora/{name}"), {}
        for path, (n_out, n_in) in shapes.items():
            slots = ("lora_embedding_A", "lora_embedding_B") if path == "emb" else ("lora_A.weight", "lora_B.weight")
            for slot, shape in zip(slots, ((config["r"], n_in), (n_out, config["r"]))):
                tensors[f"{KEY}model.{path}.{slot}"] = bf16(rng.normal(size=shape) * 0.7).astype(np.float32)
        place = Path(folder, "adapters", "xlora", name)
        place.mkdir(parents=True, exist_ok=True)
        written = {"peft_type": "LORA", "bias": "none", "inference_mode": True, **config}
        (place / "adapter_config.json").write_text(json.dumps(written, indent=1) + "\n")
        save_file(tensors, place / "adapter_model.safetensors")


@cache
def lora(folder):
    """{path: (A, B, scale)} of a saved LoRA adapter."""
    from safetensors.numpy import load_file

    c = json.loads(Path(folder, "adapter_config.json").read_text())
    t = {k.removeprefix(KEY): np.asarray(v, np.float64)
         for k, v in load_file(Path(folder, "adapter_model.safetensors")).items()}
    scale = c["lora_alpha"] / (np.sqrt(c["r"]) if c.get("use_rslora") else c["r"])
    paths = dict.fromkeys(k.partition(".lora_")[0] for k in t)
    pick = lambda path, side: next(v for k, v in t.items() if k.startswith(path) and f"_{side}" in k[len(path):])
    return {path: (pick(path, "A"), pick(path, "B"), scale) for path in paths}


def loras(c):
    return [lora(folder) for folder in c["adapters"].values()]


def widths(c, layers):
    inner = [c.get("xlora_size", 2048)] * (c.get("xlora_depth", 1) - 1)
    return [c["hidden_size"], *inner, len(c["adapters"]) * (layers if c.get("layerwise_scalings") else 1)]


def shared(c, sites):
    """The classifier's layers; ReLU and, if there is any, dropout stand between them and count."""
    layers, step = len({path for each in loras(c) for path in each}), 2 + (c.get("xlora_dropout_p", 0.2) > 0)
    found: dict = {}
    for i, (n_in, n_out) in enumerate(pairwise(widths(c, layers))):
        found |= {f"{CLASSIFIER}.{i * step}.weight": (n_out, n_in), f"{CLASSIFIER}.{i * step}.bias": (n_out,)}
    return found


def softmax(z, axis=-1):
    z = np.exp(z - z.max(axis, keepdims=True))
    return z / z.sum(axis, keepdims=True)


def classify(t, c, h, layers, axis=-1, transposed=False, drop=lambda h: h):
    """p (batch, length, layers, adapters) for hidden states h (batch, length, hidden)."""
    at = sorted({int(k.split(".")[-2]) for k in t})
    for i in at:
        h = h @ t[f"{CLASSIFIER}.{i}.weight"].T + t[f"{CLASSIFIER}.{i}.bias"]
        h = drop(np.maximum(h, 0)) if i != at[-1] else h
    n = len(c["adapters"])
    z = h.reshape(*h.shape[:2], n, -1).swapaxes(2, 3) if transposed else h.reshape(*h.shape[:2], -1, n)
    z = np.broadcast_to(z, (*h.shape[:2], layers, n))
    return softmax(z / c.get("softmax_temperature", 1.0), axis) if c.get("enable_softmax", True) else z


def weigh(p, c):
    """g p, the smaller ones left out."""
    if c.get("top_k_lora") is not None:
        least = np.sort(p, -1)[..., -c["top_k_lora"], None]
        p = np.where(p >= least, p, 0)
    if c.get("enable_softmax_topk"):
        p = np.where(p == 0, 0, softmax(np.where(p == 0, -1e300, p)))
    return c.get("global_scaling_weight", 1.0) * p


def routed(base, weights, tensors, c, inputs, first=None, weigh=weigh, **faulty):
    """(p, a function that makes {path: function(site, x)} of the layers' weights), p from a first pass."""
    t = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
    adapters = loras(c)
    paths = [p for p in numpy_model.sites(base, weights) if any(p in each for each in adapters)]

    def layers(w):
        def run(site, x, k):
            y = numpy_model.apply_layer(site, x)
            for i, each in enumerate(adapters):
                if site.path in each:
                    A, B, s = each[site.path]
                    y = y + w[..., k, i, None] * s * ((A.T[x] if site.kind == "Embedding" else x @ A.T) @ B.T)
            return y

        return {p: (lambda site, x, k=k: run(site, x, k)) for k, p in enumerate(paths)}

    value = c.get("scaling_pass_value", 0.0) if first is None else first
    constant = weigh(np.full((1, 1, len(paths), len(adapters)), value), c)
    h = numpy_model.run({**base, "layers": base["layers"][:-1]}, weights, inputs, layers(constant))
    return classify(t, c, h, len(paths), **faulty), layers


def route(base, weights, tensors, c, inputs, held=None, change=lambda p: p, weigh=weigh, **faulty):
    """{path: function(site, x)} of the adapted layers, from a first pass of the whole model, without gradients."""
    if not tensors:
        return {}
    p, layers = routed(base, weights, tensors, c, held or inputs, weigh=weigh, **faulty)
    return layers(weigh(change(p), c))


def xlora(*names, **more):
    names = names or ("both", "square", "wide")
    return {"hidden_size": 10, "adapters": {f"{i}": f"adapters/xlora/{name}" for i, name in enumerate(names)}, **more}


EXACT = ("float64", "float32")  # in bfloat16 two weights may change places, and steep ones have coarse gradients
ROWS = [
    Row("linear/plain", "states", xlora(), "core", lost=True),
    Row("linear/layerwise", "states", xlora(layerwise_scalings=True), "core", lost=True),
    Row("linear/deep", "states", xlora(xlora_depth=3, xlora_size=5), lost=True),
    Row("linear/deep-layerwise", "states", xlora(xlora_depth=2, xlora_size=7, xlora_dropout_p=0.0,
                                                 layerwise_scalings=True), lost=True),
    Row("linear/temperature", "states", xlora("both", "square", softmax_temperature=0.5), dtypes=EXACT, lost=True),
    Row("linear/no-softmax", "states", xlora("both", "wide", enable_softmax=False), dtypes=EXACT, lost=True),
    Row("linear/pass-value", "states", xlora(scaling_pass_value=0.5, global_scaling_weight=0.75), lost=True),
    Row("linear/top-k", "states", xlora(top_k_lora=2, layerwise_scalings=True), dtypes=EXACT, lost=True),
    Row("linear/softmax-top-k", "states", xlora(top_k_lora=2, enable_softmax=False, enable_softmax_topk=True),
        dtypes=EXACT, lost=True),
    Row("embedding/plain", "states-words", xlora("words", "emb", layerwise_scalings=True), "core", lost=True),
]


def wrong(**how):
    return {"route": lambda base, w, t, c, inputs, held=None: route(base, w, t, c, inputs, held, **how)}


FAULTS = (
    Fault("tokens-averaged", "every token gets the mean weights of its sample",
          wrong(change=lambda p: np.broadcast_to(p.mean(1, keepdims=True), p.shape)), caught_by=("forward",)),
    Fault("first-layer-for-all", "all layers get the weights of the first",
          wrong(change=lambda p: np.broadcast_to(p[:, :, :1], p.shape)), caught_by=("forward",),
          cases=("linear/layerwise", "linear/deep-layerwise", "embedding/plain")),
    Fault("adapters-before-layers", "the classifier's output is taken as adapters by layers", wrong(transposed=True),
          caught_by=("forward",), cases=("linear/layerwise", "linear/deep-layerwise")),
    Fault("softmax-over-layers", "the weights of the layers add up to one, not those of the adapters", wrong(axis=2),
          caught_by=("forward",), spares=("linear/no-softmax", "linear/softmax-top-k")),
    Fault("first-pass-adapted", "the adapters are fully on in the first pass", wrong(first=1.0),
          caught_by=("forward",)),
    Fault("global-weight-ignored", "global_scaling_weight is not used",
          wrong(weigh=lambda p, c: weigh(p, {**c, "global_scaling_weight": 1.0})), caught_by=("forward",),
          cases=("linear/pass-value",)),
    Fault("all-kept", "top_k_lora is not used", wrong(weigh=lambda p, c: weigh(p, {**c, "top_k_lora": None})),
          caught_by=("forward",), cases=("linear/top-k", "linear/softmax-top-k")),
)


def perturb(key, fresh, rng):
    return rng.normal(size=fresh.shape)  # the tokens must differ in what they choose


METHOD = Method(
    name="xlora", peft_type="XLORA", title="X-LoRA", paper="https://arxiv.org/abs/2402.07148",
    equation="y = W x + g sum_i p_i s_i B_i A_i x, p = softmax(C(h) / T)", rows=ROWS, shapes=lambda site, c: {},
    route=route, files=files, faults=FAULTS, merges=False,
    tensors=Tensors(shared=shared, perturb=perturb),
    laws=Laws(draw={"hidden_size": [10], "adapters": [xlora()["adapters"], xlora("both", "square")["adapters"]],
                    "layerwise_scalings": [False, True], "xlora_depth": [1, 2], "xlora_size": [5],
                    "scaling_pass_value": [0.0, 0.25]}, stacks=False, single=True, bases=("states",)),
)
