"""IA3: Liu et al., 2022, https://arxiv.org/abs/2205.05638, section 3.3."""

import re

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors


def feedforward(site, c):
    names = c.get("feedforward_modules") or []
    if isinstance(names, str):
        return re.fullmatch(names, site.path) is not None
    return any(site.path == n or site.path.endswith("." + n) for n in names)


def shapes(site, c):
    ones = [1] * len(site.kernel)
    if feedforward(site, c):
        return {"ia3_l": (1, site.inp, *ones)}
    return {"ia3_l": (1, site.out, *ones) if site.kernel else (site.out, 1)}


def formula(site, t, c):
    scale = t["ia3_l"].ravel()
    if not feedforward(site, c):
        return np.einsum("o,o...->o...", scale, site.W), None if site.b is None else scale * site.b
    groups = site.args.get("groups", 1)
    W = site.W.reshape(groups, -1, *site.W.shape[1:])
    return np.einsum("gi,goi...->goi...", scale.reshape(groups, -1), W).reshape(site.W.shape), site.b


def ia3(targets, feed=(), **more):
    return {"target_modules": list(targets), "feedforward_modules": list(feed), **more}


C, F = ["c1", "c2"], ["c_attn", "c_proj"]
ROWS = [
    Row("linear/output", "mlp", ia3(["up", "mid"]), "core", second=ia3(["up", "mid"])),
    Row("linear/feedforward", "mlp", ia3(["up", "mid"], ["mid"]), "core"),
    Row("linear/feedforward-all", "mlp-tokens", ia3(["up", "mid"], ["up", "mid"])),
    Row("linear/no-base-bias", "mlp-nobias", ia3(["up", "mid"], ["up"])),
    Row("linear/modules-to-save", "mlp", ia3(["up", "mid"], modules_to_save=["head"])),
    Row("conv2d/output", "conv2d", ia3(C), "core"),
    Row("conv2d/feedforward", "conv2d", ia3(C, C)),
    Row("conv2d/one-by-one", "conv2d-1x1", ia3(C, ["c2"])),
    Row("conv2d/dilated", "conv2d-dilated", ia3(C, ["c2"])),
    Row("conv2d/groups", "conv2d-groups", ia3(C, C)),
    Row("conv3d/both", "conv3d", ia3(C, ["c2"])),
    Row("conv1d-hf/output", "gpt", ia3(F, fan_in_fan_out=True), "core",
        note="the two layers differ in shape, so reading (in, out) as (out, in) shows"),
    Row("conv1d-hf/feedforward", "gpt", ia3(F, F, fan_in_fan_out=True)),
]

FAULTS = (
    Fault("combined-mean", "the weights of adapters that are made one are made to add up to 1",
          {"combine": lambda o, right, names, weights, *a: right(names, [w / sum(weights) for w in weights], *a)},
          caught_by=("usage",), cases=("usage/combine",)),
    Fault("bias-unscaled", "the base bias is not multiplied by l",
          {"formula": lambda s, t, c: (formula(s, t, c)[0], s.b)},
          cases=("linear/output", "conv2d/output", "conv1d-hf/output")),
    Fault("feedforward-bias-scaled", "the base bias is multiplied by l in feed-forward layers, too",
          {"formula": lambda s, t, c: (formula(s, t, c)[0], None if s.b is None else s.b * t["ia3_l"].mean())},
          cases=("linear/feedforward-all", "conv2d/feedforward")),
    Fault("one-plus", "the layer is scaled by 1 + l",
          {"formula": lambda s, t, c: formula(s, {"ia3_l": 1 + t["ia3_l"]}, c)}),
)

METHOD = Method(
    name="ia3", peft_type="IA3", title="(IA)^3", paper="https://arxiv.org/abs/2205.05638",
    equation="y = l * (W x + b); feed-forward: y = W (l * x) + b", rows=ROWS, shapes=shapes, formula=formula,
    faults=FAULTS,
    tensors=Tensors(neutral={"ia3_l": 1.0}),
    laws=Laws(draw={"target_modules": [["up", "mid"]], "feedforward_modules": [[], ["mid"], ["up", "mid"]]},
              mixed_batch=True),
)
