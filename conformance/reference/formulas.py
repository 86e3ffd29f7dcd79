"""What the formulas say about a whole model: its output, its merged weights, its parameters, its gradients.

Nothing here looks at how PEFT does it: tensors by their saved keys go in, NumPy float64 comes out.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np

from . import numpy_model
from .method import KEY, Method, slots


def plain_name(key: str) -> str:
    """The base parameter that a saved key replaces (modules_to_save, trained biases, LN tuning), if it is one."""
    return key.removeprefix(KEY).removeprefix("base_model.").replace(".base_layer.", ".")  # prompts wrap nothing


def replaced(weights: dict, tensors: dict) -> dict:
    """Base weights, with those that the adapter replaces as a whole."""
    return {**weights, **{plain_name(k): v for k, v in tensors.items() if plain_name(k) in weights}}


def with_saved_modules(weights: dict, tensors: dict, config: dict) -> dict:
    """Base weights, with those of `modules_to_save`: they stay where the adapter is taken off without merging it."""
    def saved(name):
        return any(f".{name}".rpartition(".")[0].endswith(f".{m}") for m in config.get("modules_to_save") or ())

    return {k: v if saved(k) else weights[k] for k, v in replaced(weights, tensors).items()}


def token_rows(site, t, c):
    """The rows of an embedding, W: (dim, vocab), or a head that `trainable_token_indices` replaces."""
    key = next((k for k in t if k.endswith(".trainable_tokens_delta")), None)
    if key is None:
        return None
    chosen = c.get("token_indices") or c.get("trainable_token_indices")
    if isinstance(chosen, dict):
        chosen = next(v for k, v in chosen.items() if (site.path + ".").endswith(k + "."))
    W = site.W.copy()
    (W.T if site.kind == "Embedding" else W)[list(chosen)] = t[key]
    return W, site.b


def shared_tensors(method: Method, tensors: dict) -> dict:
    """Those that belong to no single layer."""
    return {k: v for k, v in tensors.items() if method.tensors.shared and not k.startswith(KEY)}


def adapted(method: Method, base: dict, weights: dict, tensors: dict, config: dict, held: dict | None = None,
            formula=None, frozen: dict | None = None):
    """(weights with the adapter folded in, {path: tensors} of layers that have to be run instead).

    `frozen`: the base model's own weights, where `weights` hold other adapters already.
    """
    tensors = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
    folded = replaced(weights, tensors)
    routed: dict = {}
    formula = formula or method.formula
    if method.prompt:
        return folded, routed
    first = numpy_model.sites(base, frozen) if frozen and formula and asked(formula, frozen=frozen) else {}
    for path, site in numpy_model.sites(base, folded).items():
        t = slots(tensors, path)
        t = {k: v for k, v in t.items() if plain_name(f"{KEY}{path}.{k}") not in weights
             and not k.startswith("base_layer.out_proj")}
        if not t:
            continue
        t |= shared_tensors(method, tensors)
        if (new := token_rows(site, t, config)) is None:
            if method.run and (method.formula is None or site.args.get("groups", 1) > 1):
                routed[path] = t
                continue
            more = {"frozen": first[path]} if first else {}
            if held is not None:
                own = slots({k: np.asarray(v, np.float64) for k, v in held.items()}, path)
                more |= asked(formula, held=own)
            new = formula(site, t, config, **more)
        W, b = new
        folded[site.weight] = numpy_model.stored(site, W)
        if b is not None and site.bias in folded:
            folded[site.bias] = b
    return folded, routed


def output(method, base, weights, tensors, config, inputs, held=None, formula=None, run=None, prompt=None, loss=None,
           frozen=None, route=None):
    """y, as the paper says it; the loss, of shape (1,), if `labels` are among the inputs."""
    inputs = {k: np.asarray(v) for k, v in inputs.items()}
    weights = {k: np.asarray(v, np.float64) for k, v in weights.items()}
    folded, routed = adapted(method, base, weights, tensors, config, held, formula, frozen)
    run = run or method.run
    special = {p: (lambda site, x, t=t: run(site, t, config, x, inputs)) for p, t in routed.items()}
    route = route or method.route
    special |= route(base, folded, tensors, config, inputs, **asked(route, held=held)) if route else {}
    prompt = prompt or (method.prompt.formula if method.prompt else None)
    joined = prompt(tensors, config, **asked(prompt, inputs=inputs, held=held)) if prompt else {}
    y = numpy_model.run(base, folded, inputs, special, joined)
    if "labels" not in inputs:
        return y
    loss = loss or (method.prompt.loss if method.prompt else None)
    own = loss is not None and joined
    penalty = 0.0
    if method.penalty and tensors:
        more = asked(method.penalty, base=base, weights=weights, inputs=inputs)
        penalty = method.penalty(tensors, config, **more)
    return np.array([penalty + (loss(y, inputs, config) if own else numpy_model.loss(base, y, inputs["labels"]))])


def asked(function, **offered) -> dict:
    """The arguments that a function has a parameter for."""
    return {k: v for k, v in offered.items() if k in parameters(function)}


@functools.lru_cache(512)
def parameters(function) -> frozenset:
    """The names of a function's parameters: finite differences ask a hundred thousand times."""
    return frozenset(inspect.signature(function).parameters)


def gradients(method, base, weights, tensors, config, inputs, cotangent, step=1e-6, **faulty) -> dict:
    """Central differences of sum(cotangent * y), for every tensor and a float input; relative error about 1e-9."""
    found = {}
    tensors = {k: np.array(v, np.float64, order="C") for k, v in tensors.items()}  # whose reshape(-1) is a view
    inputs = {k: np.array(v, order="C") for k, v in inputs.items()}
    held = {k: v.copy() for k, v in {**inputs, **tensors}.items()}

    def loss():
        return float((output(method, base, weights, tensors, config, inputs, held, **faulty) * cotangent).sum())

    moving = {k: v for k, v in tensors.items() if not method.tensors.is_frozen(k)}
    if "x" in inputs and inputs["x"].dtype.kind == "f":
        inputs["x"] = inputs["x"].astype(np.float64)
        moving["input"] = inputs["x"]
    for key, array in moving.items():
        grad = np.zeros(array.shape)
        flat, out = array.reshape(-1), grad.reshape(-1)
        for i in range(flat.size):
            old = flat[i]
            flat[i] = old + step
            up = loss()
            flat[i] = old - step
            out[i] = (up - loss()) / (2 * step)
            flat[i] = old
        found[key] = np.where(method.tensors.fixed(key, grad.shape, config), 0, grad) if method.tensors.fixed else grad
    return found


def expected_shapes(method, base, weights, config, targets) -> dict:
    """Saved key -> shape in closed form, for the layers `targets`."""
    at = numpy_model.sites(base, weights)
    found = {f"{KEY}{p}.{slot}": tuple(s) for p in targets for slot, s in method.shapes(at[p], config).items()}
    if method.tensors.shared:
        found.update(method.tensors.shared(config, [at[p] for p in targets]))  # prompts have no targets
    return found


def trained_count(method, shapes: dict, config) -> int:
    """How many of the numbers in the tensors of `shapes` are trained."""
    shapes = method.live(config) or shapes
    trained = {k: s for k, s in shapes.items() if not method.tensors.is_frozen(k)}
    fixed = method.tensors.fixed
    left_out = [np.broadcast_to(fixed(k, s, config), s).sum() for k, s in trained.items()] if fixed else []
    return int(sum(np.prod(s) for s in trained.values()) - sum(left_out))
