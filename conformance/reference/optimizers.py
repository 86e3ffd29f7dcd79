"""LoRA's own optimizers, and what becomes of an adapter without its intruder dimensions. Tensors by saved keys.

LoRA+: Hayou et al., 2024, https://arxiv.org/abs/2402.12354. Riemannian preconditioning: Zhang and Pilanci, 2024,
https://arxiv.org/abs/2402.02347. LoRA-FA: Zhang et al., 2023, https://arxiv.org/abs/2308.03303. Intruder dimensions:
Shuttleworth et al., 2024, https://arxiv.org/abs/2410.21228.
"""

from __future__ import annotations

import numpy as np


def gram(M, damp: float = 0.0):
    """(M M^T + damp I)^-1."""
    return np.linalg.inv(M @ M.T + damp * np.eye(len(M)))


def is_A(key: str) -> bool:
    return key.endswith("lora_A.weight")


def is_B(key: str) -> bool:
    return key.endswith("lora_B.weight")


def lora_plus(tensors, slopes, options) -> dict:
    """Plain descent: B, biases and other vectors learn faster than A, factors on embeddings at a rate of their own;
    biases do not decay."""
    found = {}
    for key, value in tensors.items():
        rate, decay = options["lr"], options["loraplus_weight_decay"]
        if "lora_embedding" in key:
            rate = options["loraplus_lr_embedding"]
        elif "lora_B" in key or value.ndim == 1:
            rate *= options["loraplus_lr_ratio"]
            decay = 0 if key.endswith(".bias") else decay
        found[key] = value - rate * (slopes[key] + decay * value) if key in slopes else value
    return found


def riemannian(tensors, slopes, options) -> dict:
    """Plain descent along gradients of A and B that the other one's Gram matrix preconditions."""
    found = {}
    for key, value in tensors.items():
        g = slopes.get(key, 0)
        if is_A(key):
            g = gram(tensors[key.replace("lora_A", "lora_B")].T, options["reg"]) @ g
        elif is_B(key):
            g = g @ gram(tensors[key.replace("lora_B", "lora_A")], options["reg"])
        found[key] = value - options["lr"] * g
    return found


class LoraFA:
    """AdamW, its decay after the step, on gradients of B times (A A^T)^-1 / scale^2; A stays."""

    def __init__(self, options, strength):
        self.rate, self.decay, self.strength = options["lr"], options["weight_decay"], strength
        self.count, self.moments = 0, {}

    def step(self, tensors, slopes) -> dict:
        self.count += 1
        size, found = self.rate * np.sqrt(1 - 0.999**self.count) / (1 - 0.9**self.count), dict(tensors)
        for key, g in slopes.items():
            if key not in tensors or is_A(key):
                continue
            if is_B(key):
                A = tensors[key.replace("lora_B", "lora_A")]
                g = g @ gram(A) / self.strength(key, len(A)) ** 2
            m, v = self.moments.get(key, (0, 0))
            m, v = self.moments[key] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            found[key] = (tensors[key] - size * m / (np.sqrt(v) + 1e-6)) * (1 - self.rate * self.decay)
        return found


def likeness(W, merged, top: int):
    """How like each of a merged weight's first directions is to the most alike direction of the frozen one."""
    U, V = (np.linalg.svd(M, full_matrices=False)[0] for M in (W, merged))
    return np.abs(V.T @ U).max(1)[:top]


def without_intruders(W, merged, rank: int, top: int, limit: float, part: float):
    """The factors B, A of what an adapter adds, its intruder dimensions left at a `part` of their strength."""
    U, S, V = np.linalg.svd(merged, full_matrices=False)
    chosen = np.flatnonzero(likeness(W, merged, top) < limit)
    left = merged - (1 - part) * (U[:, chosen] * S[chosen]) @ V[chosen] - W
    u, s, v = np.linalg.svd(left, full_matrices=False)
    return u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * v[:rank]
