"""MonteCLoRA: Seth et al., 2024, https://arxiv.org/abs/2411.04358. In use it is LoRA: its draws end with training.

The parameters of the distributions and their last moments are saved beside A and B, O(r) of them for each layer.
"""

import math

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from . import lora as LoRA

SLOT = "lora_monteclora_sampler"
MOMENTS = f"{SLOT}.gaussian_var_prior", f"{SLOT}.expert_weights"
PRIORS = f"{SLOT}.std_prior", f"{SLOT}.expert_weights_prior"


def shapes(site, c):
    r, n = LoRA.rank(site, c), c["monteclora_config"]["num_samples"]
    return {**LoRA.shapes(site, c), **dict(zip(MOMENTS, [(r, r), (n,)])), **dict(zip(PRIORS, [(r,), (n,)]))}


def penalty(tensors, c):
    """The mean over layers of the divergences from the priors, before anything was drawn."""
    return np.mean([prior(tensors[k], tensors[k.replace("std_prior", "expert_weights_prior")], c["monteclora_config"])
                    for k in sorted(tensors) if k.endswith("std_prior")])


def prior(rho, pi, how):
    """One layer's divergences from its priors, the sum of log-gammas being added as the reference does."""
    a, b, r = np.exp(np.asarray(pi, np.float64)), how["dirichlet_prior"], len(rho)
    gamma = math.lgamma

    def digamma(x, h=1e-5):
        return (gamma(x + h) - gamma(x - h)) / (2 * h)

    dirichlet = gamma(a.sum()) - gamma(b * len(a)) + sum(gamma(x) - gamma(b) for x in a)
    dirichlet += sum((x - b) * (digamma(x) - digamma(a.sum())) for x in a)
    wishart = r / 2 * (np.exp(2 * rho) - 2 * rho - 1).sum()
    return how["kl_loss_weight"] * (dirichlet + wishart) + how["use_entropy"] / len(a)


def monteclora(num_samples=3, sample_scaler=0.1, use_entropy=False, **more):
    fields = {"num_samples": num_samples, "sample_scaler": sample_scaler, "use_entropy": use_entropy}
    rest = {"dirichlet_prior": 0.1, "kl_loss_weight": 1e-5, "buffer_size": 2}
    return LoRA.lora(monteclora_config={**fields, **rest}, **more)


ROWS = [
    Row("linear/plain", "mlp", monteclora(), "core", second=monteclora(use_rslora=True)),
    Row("linear/entropy", "mlp-tokens", monteclora(use_entropy=True, r=3), "core"),
    Row("linear/one-sample", "mlp-nobias", monteclora(num_samples=1)),
    Row("linear/rslora", "mlp", monteclora(use_rslora=True)),
    Row("linear/lora-bias", "mlp", monteclora(lora_bias=True)),
    Row("linear/modules-to-save", "mlp", monteclora(modules_to_save=["head"])),
    Row("linear/rank-pattern", "blocks", monteclora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})),
    Row("conv1d-hf/plain", "gpt", monteclora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core"),
]


def noisy(site, t, c):
    """One deviation of the perturbation stays on A."""
    deviation = c["monteclora_config"]["sample_scaler"] * np.exp(t[PRIORS[0]])[:, None]  # (r, 1)
    return LoRA.formula(site, {**t, "lora_A.weight": t["lora_A.weight"] + deviation}, c)


def unnormalised(site, t, c):
    """A is added up over the samples with the weights as they are trained, whose sum is not 1."""
    total = np.exp(t[PRIORS[1]]).sum()
    return LoRA.formula(site, {**t, "lora_A.weight": total * t["lora_A.weight"]}, c)


FAULTS = (
    Fault("noise-outside-training", "A is perturbed in evaluation mode, too", {"formula": noisy}),
    Fault("weights-without-softmax", "A is multiplied by the sum of weights that do not add up to 1",
          {"formula": unnormalised}),
)

METHOD = Method(
    name="monteclora", peft_type="LORA", title="MonteCLoRA", paper="https://arxiv.org/abs/2411.04358",
    equation="W' = W + (alpha / r) B A", rows=ROWS, shapes=shapes, formula=LoRA.formula, faults=FAULTS,
    tensors=Tensors(frozen=MOMENTS, neutral={"lora_B.weight": 0.0, "lora_B.bias": 0.0}),
    laws=Laws(draw={"r": [1, 2, 5], "lora_alpha": [1, 3, 8], "target_modules": [["up", "mid"]],
                    "monteclora_config": [{"num_samples": 3, "buffer_size": 2}, {"num_samples": 1, "buffer_size": 1}]},
              idle=lambda key, c: SLOT in key, mixed_batch=True, scales=True),
)
