"""VeLoRA: Miles et al., 2024, https://arxiv.org/abs/2405.17991. In use it is LoRA; the direction v is saved beside it.

What v does while training, to the gradient of A, no case can hold: the checks run in evaluation mode.
"""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from . import lora as LoRA

V = "lora_velora_embed"


def shapes(site, c):
    return {**LoRA.shapes(site, c), V: (-(-site.inp // c["velora_config"]["num_groups"]),)}


def velora(num_groups=3, init_type="batch_average", scale=0.5, **more):
    return LoRA.lora(velora_config={"num_groups": num_groups, "init_type": init_type, "scale": scale}, **more)


ROWS = [
    Row("linear/plain", "mlp", velora(), "core", second=velora(r=2)),
    Row("linear/random", "mlp-tokens", velora(init_type="random", r=3), "core"),
    Row("linear/once", "mlp-nobias", velora(init_type="batch_average_once")),
    Row("linear/more-groups-than-features", "mlp", velora(num_groups=64)),
    Row("linear/rslora", "mlp", velora(use_rslora=True)),
    Row("linear/lora-bias", "mlp", velora(lora_bias=True)),
    Row("linear/modules-to-save", "mlp", velora(modules_to_save=["head"])),
    Row("linear/rank-pattern", "blocks", velora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})),
    Row("conv1d-hf/plain", "gpt", velora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core"),
]


def compressed(site, t, c):
    """W + s B A P, where P puts every sub-token in the place of its part along v, as in the backward pass."""
    v, n = t[V], c["velora_config"]["num_groups"]
    P = c["velora_config"]["scale"] * np.kron(np.eye(n), np.outer(v, v))[: site.inp, : site.inp]
    W, b = LoRA.formula(site, t, c)
    return site.W + (W - site.W) @ P, b


FAULTS = (
    Fault("forward-compressed", "the forward pass, too, sees the inputs rebuilt from v", {"formula": compressed}),
    Fault("scale-in-the-forward", "the scale of the rebuilt inputs is put on the delta",
          {"formula": lambda site, t, c: LoRA.formula(site, {**t, "lora_A.weight": t["lora_A.weight"] / 2}, c)}),
)

def fresh(site, t, c):
    """The direction is 0 before a batch was seen, if it is not drawn."""
    return t if c["velora_config"].get("init_type") == "random" else {**t, V: 0 * t[V]}


METHOD = Method(
    name="velora", peft_type="LORA", title="VeLoRA", paper="https://arxiv.org/abs/2405.17991",
    equation="W' = W + (alpha / r) B A", rows=ROWS, shapes=shapes, formula=LoRA.formula, faults=FAULTS,
    tensors=Tensors(frozen=(V,), fresh=fresh, neutral={"lora_B.weight": 0.0, "lora_B.bias": 0.0}),
    laws=Laws(draw={"r": [1, 2, 5], "lora_alpha": [1, 3, 8], "target_modules": [["up", "mid"]],
                    "velora_config": [{"num_groups": 3}, {"num_groups": 4, "init_type": "random"}]}, mixed_batch=True,
              scales=True),
)
