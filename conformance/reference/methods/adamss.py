"""AdaMSS: Zheng et al., 2025, https://openreview.net/forum?id=8ZdWmpYxT0.

Which row of a weight is in which subspace is not saved: it is found again by the k-means that the reference calls,
scikit-learn's with the rows to start from drawn at a fixed seed. The reference decomposes the weight by a random
projection, which `random_seed` fixes; `r` and the seed of each row are such that the exact decomposition sorts alike.
"""

import numpy as np

from ..method import Budget, Fault, Laws, Method, Row, Tensors

V = "adamss_newB"
A, B = "adamss_A.{}".format, "adamss_B.{}".format
FIRST_ROWS, ITERATIONS, STILL = 123456789, 10, 1e-4


def decomposed(site, c):
    """(U, S, V) of [W b], cut to the r largest singular values."""
    whole = site.W if site.b is None else np.column_stack([site.W, site.b])
    left, s, right = np.linalg.svd(whole, full_matrices=False)
    r = c.get("r", 100)
    return left[:, :r], s[:r], right[:r]


def subspaces(site, c):
    """The rows of each cluster of the rows of U."""
    X = decomposed(site, c)[0]
    n, k = len(X), min(c.get("num_subspaces", 5), len(X))
    centres = X[np.random.RandomState(FIRST_ROWS).choice(n, k, replace=False, p=np.full(n, 1 / n))]

    def nearest():
        return np.linalg.norm(X[:, None] - centres, axis=-1).argmin(1)

    for _ in range(ITERATIONS):
        labels = nearest()
        moved = np.array([X[labels == i].mean(0) for i in range(k)]) - centres
        centres = centres + moved
        if (moved**2).sum() <= STILL * X.var(0).mean():
            break
    labels = nearest()
    return [np.flatnonzero(labels == i) for i in range(k)]


def rank(U, c):
    """That of A and B in the subspace with the rows U."""
    most = min(c.get("subspace_rank", 1), *U.shape)
    if not c.get("use_dynamic_rank"):
        return most
    s = np.linalg.svd(U, compute_uv=False) ** 2
    return min(most, int((s > c.get("svd_threshold", 0.1) * s[0]).sum()))


def shapes(site, c):
    U, _, right = decomposed(site, c)
    found = {V: right.shape}
    for i, rows in enumerate(subspaces(site, c)):
        s = rank(U[rows], c)
        found |= {A(i): (s, len(right)), B(i): (len(rows), s)}
    return found


def formula(site, t, c, frozen=None, change=lambda D, rows: D, shift=0, scale=False):
    D = np.zeros((site.out, t[V].shape[1]))
    rows = subspaces(frozen or site, c)
    right = decomposed(frozen or site, c)[1][:, None] * t[V] if scale else t[V]
    for i, own in enumerate(rows):
        D[own] = t[B(i)] @ t[A((i + shift) % len(rows))] @ right
    D = change(D, rows)
    return site.W + D[:, : site.inp], None if site.b is None else site.b + D[:, -1]


def fresh(site, t, c):
    return {V: decomposed(site, c)[2]}


class Chosen:
    """Which subspaces are trained: those of most importance since the choice before, out of all layers together.

    Importance is AdaLoRA's: |parameter * gradient| and how much it varies, both averaged. As in the reference, one
    subspace fewer than the schedule says is left, and one that is out stays out.
    """

    def __init__(self, c, tensors):
        self.c, self.average, self.uncertainty = c, {}, {}
        self.kept = {k: True for k in tensors if not k.endswith(V)}

    def budget(self, step) -> int:
        c, most = self.c, sum(".adamss_A." in k for k in self.kept)
        left = 1 - (step - c["init_warmup"]) / (c["final_warmup"] - c["init_warmup"])
        return int(c["asa_target_subspaces"] + (most - c["asa_target_subspaces"]) * left ** c["asa_schedule_exponent"])

    def step(self, tensors, gradients, step) -> dict:
        """The tensors as they are; `kept`, by saved key, is what is trained after step number `step`."""
        c = self.c
        if not c["init_warmup"] <= step <= c["final_warmup"]:
            return tensors
        for k in (k for k, on in self.kept.items() if on):
            now, before = np.abs(tensors[k] * gradients[k]), self.average.get(k, 0)
            b1, b2 = c["asa_importance_beta"], c["asa_uncertainty_beta"]
            self.uncertainty[k] = b2 * self.uncertainty.get(k, 0) + (1 - b2) * np.abs(now - before)
            self.average[k] = b1 * before + (1 - b1) * now
        if step % c["mask_interval"] == 0:
            self.choose(self.budget(step))
        return tensors

    def choose(self, budget):
        mean = {k: (self.average[k] * self.uncertainty[k]).mean() for k in self.average}
        score = {k: mean[k] + mean[k.replace("_A.", "_B.")] for k in mean if ".adamss_A." in k}
        least = -np.inf if budget >= len(score) else sorted(score.values())[-budget]
        for k, v in score.items():
            self.kept[k] = self.kept[k.replace("_A.", "_B.")] = v > least
        self.average, self.uncertainty = {}, {}


def adamss(**more):
    return {"r": 3, "num_subspaces": 3, "target_modules": ["up", "mid"], **more}


ROWS = [
    Row("linear/plain", "mlp", adamss(r=5), "core", second={}),
    Row("linear/no-base-bias", "mlp-nobias", adamss(num_subspaces=2, subspace_rank=2)),
    Row("linear/tokens", "mlp-tokens", adamss(r=6, subspace_rank=2), "core"),
    Row("linear/one-subspace", "mlp", adamss(num_subspaces=1, subspace_rank=3)),
    Row("linear/all-vectors", "mlp", adamss(r=100, target_modules=["up"])),
    Row("linear/dynamic-rank", "mlp", adamss(r=4, num_subspaces=2, subspace_rank=3, use_dynamic_rank=True,
                                             svd_threshold=0.5)),
    Row("linear/seed", "mlp", adamss(random_seed=5)),
    Row("linear/adaptive", "mlp", adamss(r=6, use_asa=True, asa_target_subspaces=2)),
    Row("linear/modules-to-save", "mlp", adamss(r=6, random_seed=1, modules_to_save=["head"])),
]


def wrong(**change):
    return {"formula": lambda s, t, c, frozen=None: formula(s, t, c, frozen, **change)}


def in_order(D, rows):
    """The subspaces one below the other."""
    return D[np.concatenate(rows)]


def no_last_column(D, rows):
    return np.column_stack([D[:, :-1], 0 * D[:, -1]])


FAULTS = (
    Fault("rows-not-put-back", "the subspaces' rows stay one below the other", wrong(change=in_order),
          spares=("linear/one-subspace",)),
    Fault("bias-ignored", "the column of V beside the bias changes nothing", wrong(change=no_last_column),
          spares=("linear/no-base-bias",)),
    Fault("subspaces-mixed", "each subspace has the A of the next", wrong(shift=1),
          cases=("linear/plain", "linear/all-vectors", "linear/seed", "linear/adaptive", "linear/modules-to-save")),
    Fault("singular-values-in-v", "V is scaled by the singular values", wrong(scale=True)),
)

METHOD = Method(
    name="adamss", peft_type="ADAMSS", title="AdaMSS", paper="https://openreview.net/forum?id=8ZdWmpYxT0",
    equation="[W' b'] = [W b] + S B A V", rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(frozen=(V,), neutral={B(i): 0.0 for i in range(3)}, fresh=fresh),
    budget=Budget(Chosen),
    laws=Laws(draw={"r": [2, 3], "num_subspaces": [1, 2, 3], "subspace_rank": [1, 2],
                    "target_modules": [["up", "mid"]]}),
)
