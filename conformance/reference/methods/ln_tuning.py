"""LN tuning: Zhao et al., 2023, https://arxiv.org/abs/2312.11420: the norm layers themselves are trained."""

from ..method import Fault, Laws, Method, Row, Tensors

W, B = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


def shapes(site, c):
    return {W: site.W.shape, **({B: site.b.shape} if site.b is not None else {})}


def formula(site, t, c):
    return t[W], t.get(B)


def ln(**more):
    return {"target_modules": ["norm", "norm2"], **more}


ROWS = [
    Row("norm/plain", "norm", ln(), "core", second={}),
    Row("norm/one-of-two", "norm", ln(target_modules=["norm"]), "core"),
    Row("norm/modules-to-save", "norm", ln(modules_to_save=["head"])),
    Row("linear/any-layer", "norm", ln(target_modules=["mid"]), note="any module may be tuned whole"),
]

FAULTS = (
    Fault("bias-kept", "the old bias is used with the new weight", {"formula": lambda s, t, c: (t[W], s.b)}),
    Fault("added", "the trained weight is added to the old one", {"formula": lambda s, t, c: (s.W + t[W], t.get(B))}),
    Fault("merged-stays", "unmerging takes out the last of several adapters that were merged, and the others stay",
          {"unmerge": lambda o, right: setattr(o, "merged", o.merged[:-1])}, caught_by=("usage",),
          cases=("usage/merged-over",)),
    Fault("copies-in-32-bits", "the copies of a base's layers of 16 bits have 32",
          {"cast": lambda o, right, dtype, options: "float32"}, caught_by=("usage",), cases=("usage/autocast",)),
)

METHOD = Method(
    name="ln_tuning", peft_type="LN_TUNING", title="LN tuning", paper="https://arxiv.org/abs/2312.11420",
    equation="y = g' norm(x) + b'", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(fresh=lambda site, t, c: {W: site.W, **({B: site.b} if site.b is not None else {})}),
    laws=Laws(draw={"target_modules": [["norm"], ["norm", "norm2"]]}, mixed_batch=True, bases=("norm",), stacks=False,
              together=False, fresh_identity=True),
)
