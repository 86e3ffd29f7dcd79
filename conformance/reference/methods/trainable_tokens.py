"""Trainable tokens: chosen rows of an embedding are replaced by trained ones."""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors

SLOT = "trainable_tokens_delta"


def shapes(site, c):
    return {SLOT: (len(c["token_indices"]), site.out)}


def formula(site, t, c, put=lambda old, new: new):
    W = site.W.copy()  # (dim, vocab)
    for row, token in zip(t[SLOT], c["token_indices"]):
        W[:, token] = put(W[:, token], row)
    return W, site.b


def tokens(*indices, **more):
    return {"token_indices": list(indices), "target_modules": ["embed_tokens"], **more}


ROWS = [
    Row("embedding/plain", "tokens-mlp", tokens(1, 4, 7), "core", second={}),
    Row("embedding/unsorted", "tokens-mlp", tokens(9, 0, 5), "core"),
    Row("embedding/one", "tokens-mlp", tokens(3)),
    Row("embedding/drawn", "tokens-mlp", tokens(2, 6, init_weights=False)),
    Row("embedding/scaled", "embedding-scaled", tokens(2, 5, target_modules=["emb"])),
]

FAULTS = (
    Fault("added", "the trained rows are added to the old ones, not put in their place",
          {"formula": lambda s, t, c: formula(s, t, c, put=np.add)}),
    Fault("sorted", "the indices are sorted, the rows are not",
          {"formula": lambda s, t, c: formula(s, t, {**c, "token_indices": sorted(c["token_indices"])})},
          cases=("embedding/unsorted",)),
)

METHOD = Method(
    name="trainable_tokens", peft_type="TRAINABLE_TOKENS", title="Trainable tokens",
    paper="https://huggingface.co/docs/peft/package_reference/trainable_tokens", equation="E'[i] = delta_i",
    rows=ROWS, shapes=shapes, formula=formula, faults=FAULTS,
    tensors=Tensors(fresh=lambda site, t, c: {SLOT: site.W[:, c["token_indices"]].T}),
    laws=Laws(draw={"token_indices": [[0], [3, 1], [5, 2, 7]], "target_modules": [["embed_tokens"]]},
              fresh_identity=True, stacks=False, together=False, bases=("tokens-mlp",), mixed_batch=True),
)
