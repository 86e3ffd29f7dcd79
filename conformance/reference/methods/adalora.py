"""AdaLoRA: Zhang et al., 2023, https://arxiv.org/abs/2303.10512, eq. 3."""

from ..method import Fault, Laws, Method, Row, Tensors

EPSILON = 1e-5  # the reference adds it to the rank it divides by


def rank(site, c):
    return c.get("init_r", 12)


def shapes(site, c):
    r, i = rank(site, c), site.inp
    for k in site.kernel:
        i *= k
    return {"lora_A": (r, i), "lora_B": (site.out, r), "lora_E": (r, 1)}


def scale(site, c):
    return c.get("lora_alpha", 8) / (rank(site, c) + EPSILON)


def formula(site, t, c):
    D = t["lora_B"] @ (t["lora_E"] * t["lora_A"])
    return site.W + scale(site, c) * D.reshape(site.W.shape), site.b


def adalora(**more):
    return {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 20, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", adalora(), "core", second={}),
    Row("linear/no-base-bias", "mlp-nobias", adalora(init_r=3)),
    Row("linear/tokens", "mlp-tokens", adalora(lora_alpha=5), "core"),
    Row("linear/modules-to-save", "mlp", adalora(modules_to_save=["head"])),
    Row("conv2d/plain", "conv2d", adalora(target_modules=["c1", "c2"])),
    Row("linear/rank-is-width", "mlp", adalora(init_r=10)),
    Row("conv2d/one-by-one", "conv2d-1x1", adalora(target_modules=["c1", "c2"])),
    Row("conv1d-hf/plain", "gpt", adalora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
]


def wrong(make):
    return {"formula": make}


FAULTS = (
    Fault("alpha-not-over-r", "the scale is alpha, not alpha / r",
          wrong(lambda s, t, c: formula(s, t, {**c, "lora_alpha": c["lora_alpha"] * c["init_r"]}))),
    Fault("target-rank", "divides by target_r, not by the rank in use",
          wrong(lambda s, t, c: formula(s, t, {**c, "lora_alpha": c["lora_alpha"] * c["init_r"] / c["target_r"]}))),
    Fault("singular-values-ignored", "E is not multiplied in",
          wrong(lambda s, t, c: formula(s, {**t, "lora_E": t["lora_E"] * 0 + 1}, c))),
)

METHOD = Method(
    name="adalora", peft_type="ADALORA", title="AdaLoRA", paper="https://arxiv.org/abs/2303.10512",
    equation="W' = W + (alpha / r) B diag(E) A", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(neutral={"lora_E": 0.0}),
    laws=Laws(draw={"init_r": [1, 2, 4], "lora_alpha": [1, 3, 8], "total_step": [10],
                    "target_modules": [["up", "mid"]]}, second={"inference_mode": True}, mixed_batch=True),
)
