"""DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353, eq. 5; for gradients the norm is constant (sec. 4.3)."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from . import lora as LoRA


def column_norm(V):
    """One norm per output: (out,)."""
    return np.sqrt((V**2).reshape(V.shape[0], -1).sum(1))


def shapes(site, c):
    m = (1, site.out, *[1] * len(site.kernel)) if site.kernel else (site.out,)
    return {**LoRA.shapes(site, c), "lora_magnitude_vector": m}


def formula(site, t, c, held=None):
    V = LoRA.formula(site, t, c)[0]
    constant = LoRA.formula(site, held or t, c)[0]
    scale = t["lora_magnitude_vector"].ravel() / column_norm(constant)
    return np.einsum("o,o...->o...", scale, V), site.b


def dora(**more):
    return LoRA.lora(use_dora=True, **more)


C = ["c1", "c2"]
ROWS = [
    Row("linear/plain", "mlp", dora(), "core", second=dora(r=2)),
    Row("linear/rslora", "mlp-tokens", dora(use_rslora=True, r=3)),
    Row("linear/no-base-bias", "mlp-nobias", dora(), "core"),
    Row("linear/rank-above-width", "mlp", dora(r=12)),
    Row("linear/rank-is-width", "mlp", dora(r=10), note=LoRA.SQUARE),
    Row("linear/modules-to-save", "mlp", dora(modules_to_save=["head"])),
    Row("linear/rank-pattern", "blocks", dora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})),
    Row("conv1d/plain", "conv1d", dora(target_modules=C)),
    Row("conv2d/plain", "conv2d", dora(target_modules=C), "core"),
    Row("conv2d/strided", "conv2d-strided", dora(target_modules=C)),
    Row("conv2d/one-by-one", "conv2d-1x1", dora(target_modules=C)),
    Row("conv3d/plain", "conv3d", dora(target_modules=C)),
    Row("embedding/plain", "embedding", dora(target_modules=["emb"]), "core"),
    Row("embedding/scaled", "embedding-scaled", dora(target_modules=["emb"])),
    Row("conv1d-hf/plain", "gpt", dora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core"),
]


def other_axis(site, t, c):
    """The norm over outputs, one per input, where the layer is square."""
    V = LoRA.formula(site, t, c)[0]
    if V.ndim > 2 or V.shape[0] != V.shape[1]:
        return formula(site, t, c)
    return t["lora_magnitude_vector"][:, None] / np.sqrt((V**2).sum(0))[None] * V, site.b


def base_norm(site, t, c):
    V = LoRA.formula(site, t, c)[0]
    return np.einsum("o,o...->o...", t["lora_magnitude_vector"].ravel() / column_norm(site.W), V), site.b


def with_bias(site, t, c):
    W, b = formula(site, t, c)
    V = LoRA.formula(site, t, c)[0]
    return W, None if b is None else b * t["lora_magnitude_vector"].ravel() / column_norm(V)


FAULTS = (
    Fault("norm-of-the-base", "divides by the norm of W, not of W + dW", {"formula": base_norm}),
    Fault("norm-over-the-wrong-axis", "norms of columns where rows are meant (square layers)", {"formula": other_axis},
          cases=("linear/plain", "linear/no-base-bias", "conv1d-hf/plain"),
          link="https://github.com/huggingface/peft/issues/2348"),
    Fault("bias-scaled", "the base bias is scaled along with the weight", {"formula": with_bias},
          cases=("linear/plain", "conv2d/plain", "conv1d-hf/plain"),
          link="https://github.com/huggingface/peft/pull/2371"),
    Fault("embed-scale-ignored", "what is added to a scaled embedding is not scaled",
          {"formula": LoRA.unscaled(formula)}, cases=("embedding/scaled",)),
    Fault("magnitude-ignored", "the magnitude is not applied",
          {"formula": lambda site, t, c: LoRA.formula(site, t, c)}),
    Fault("gradient-through-the-norm", "the norm is differentiated, too",
          {"formula": lambda site, t, c: formula(site, t, c)}, caught_by=("gradients",), gradient_only=True),
)

METHOD = Method(
    name="dora", peft_type="LORA", title="DoRA", paper="https://arxiv.org/abs/2402.09353",
    equation="W' = m (W + s B A) / |W + s B A|", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"lora_B.weight": 0.0, "lora_embedding_A": 0.0},
                    fresh=lambda site, t, c: {"lora_magnitude_vector": column_norm(site.W).reshape(
                        shapes(site, c)["lora_magnitude_vector"])}),
    laws=Laws(draw={"use_dora": [True], "r": [1, 2, 5], "lora_alpha": [1, 3, 8], "target_modules": [["up", "mid"]]},
              mixed_batch=True, stacks=False, fresh_identity=True),
)
