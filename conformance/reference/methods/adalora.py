"""AdaLoRA: Zhang et al., 2023, https://arxiv.org/abs/2303.10512, eq. 3."""

import numpy as np

from ..method import Budget, Fault, Laws, Method, Row, Tensors

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


class Allocator:
    """Which singular values are left, step by step: eq. 7 to 12, and the cubic schedule of section 3.3."""

    def __init__(self, c, tensors):
        self.c, self.kept = c, {}
        self.average = {k: np.zeros(v.shape) for k, v in tensors.items()}
        self.uncertainty = {k: np.zeros(v.shape) for k, v in tensors.items()}

    def budget(self, step) -> int:
        """How many are left in all layers together."""
        layers = sum(k.endswith("lora_E") for k in self.average)
        first, last = self.c["init_r"] * layers, self.c["target_r"] * layers
        start, end = self.c["tinit"], self.c["total_step"] - self.c["tfinal"]
        return int((first - last) * (1 - (step - start) / (end - start)) ** 3 + last)

    def step(self, tensors, gradients, step) -> dict:
        """The tensors after step number `step`; `kept`, by the path of a layer, is what is left of it."""
        end = self.c["total_step"] - self.c["tfinal"]
        if step < end:
            for k, v in tensors.items():
                sensitivity, b1, b2 = np.abs(v * gradients[k]), self.c["beta1"], self.c["beta2"]
                self.average[k] = b1 * self.average[k] + (1 - b1) * sensitivity
                self.uncertainty[k] = b2 * self.uncertainty[k] + (1 - b2) * np.abs(sensitivity - self.average[k])
        if step == end or (self.c["tinit"] < step < end and step % self.c["deltaT"] == 0):
            self.kept = self.choose(self.budget(step))
        elif step < end:
            return tensors
        return {k: v * self.kept[k.rpartition(".")[0]][:, None] if k.endswith("lora_E") else v
                for k, v in tensors.items()}

    def choose(self, budget) -> dict:
        score = {k: self.average[k] * self.uncertainty[k] for k in self.average}
        total = {p: score[f"{p}.lora_E"][:, 0] + score[f"{p}.lora_A"].mean(1) + score[f"{p}.lora_B"].mean(0)
                 for p in sorted({k.rpartition(".")[0] for k in score})}
        every = np.sort(np.concatenate(list(total.values())))
        return {p: v > every[len(every) - budget - 1] for p, v in total.items()}


def pruned(tensors, kept):
    """What a checkpoint holds: nothing of the values that are left out. `kept` as of `Allocator`."""
    found = dict(tensors)
    for path, left in kept.items():
        if len(tensors[f"{path}.lora_E"]) != len(left):
            continue  # it came from such a checkpoint
        for slot in ("lora_A", "lora_B", "lora_E"):
            value = tensors[f"{path}.{slot}"]
            found[f"{path}.{slot}"] = value[:, left] if slot == "lora_B" else value[left]
    return found


def penalty(tensors, c):
    """What the loss is more by: how far A and B are from having orthogonal rows and columns, eq. 4."""
    held = [v if k.endswith("lora_A") else v.T for k, v in sorted(tensors.items()) if k.endswith(("lora_A", "lora_B"))]
    return c.get("orth_reg_weight", 0.5) * np.mean([np.linalg.norm(P @ P.T - np.eye(len(P))) for P in held])


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
    tensors=Tensors(neutral={"lora_E": 0.0}), penalty=penalty, budget=Budget(Allocator, pruned),
    laws=Laws(draw={"init_r": [1, 2, 4], "lora_alpha": [1, 3, 8], "total_step": [10],
                    "target_modules": [["up", "mid"]]}, second={"inference_mode": True}, mixed_batch=True),
)
