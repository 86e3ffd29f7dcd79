"""BD-LoRA: Wang et al., 2025, https://arxiv.org/abs/2510.23346. LoRA with A or B block-diagonal, n = nblocks.

The blocks of a factor stand one below the other: A (r, in / n) or B (out, r / n).
"""

import numpy as np

from ..method import Fault, Laws, Method, Row, Tensors
from . import lora as LoRA

A, B = "lora_A.weight", "lora_B.weight"


def sides(site, c):
    """Which factors have blocks: those whose list holds a part of the layer's path."""
    lists = {A: c["use_bdlora"].get("target_modules_bd_a"), B: c["use_bdlora"].get("target_modules_bd_b")}
    return [slot for slot, parts in lists.items() if any(part in site.path for part in parts or ())]


def shapes(site, c):
    n, found = c["use_bdlora"]["nblocks"], sides(site, c)
    return {slot: (shape[0], shape[1] // n) if slot in found else shape for slot, shape in LoRA.shapes(site, c).items()}


def block_diagonal(W, n):
    """(out, in / n), n blocks one below the other -> (out, in)."""
    height, width = W.shape[0] // n, W.shape[1]
    whole = np.zeros((W.shape[0], width * n), W.dtype)
    for i in range(n):
        rows = slice(i * height, (i + 1) * height)
        whole[rows, i * width:(i + 1) * width] = W[rows]
    return whole


def with_factors(whole):
    def formula(site, t, c):
        n = c["use_bdlora"]["nblocks"]
        return LoRA.formula(site, {**t, **{slot: whole(t[slot], n) for slot in sides(site, c)}}, c)

    return formula


formula = with_factors(block_diagonal)


def bdlora(a=("up",), b=("mid",), n=2, strict=True, **more):
    blocks = {"target_modules_bd_a": list(a), "target_modules_bd_b": list(b), "nblocks": n, "match_strict": strict}
    return LoRA.lora(use_bdlora=blocks, **more)


ROWS = [
    Row("linear/plain", "mlp", bdlora(), "core", second=bdlora(r=2)),
    Row("linear/other-side", "mlp-tokens", bdlora(a=["mid"], b=["up"]), "core"),
    Row("linear/rslora", "mlp", bdlora(use_rslora=True)),
    Row("linear/one-block", "mlp-nobias", bdlora(n=1)),
    Row("linear/some-plain", "mlp", bdlora(a=[], strict=False)),
    Row("linear/modules-to-save", "mlp", bdlora(modules_to_save=["head"])),
    Row("linear/part-of-path", "blocks", bdlora(a=["layers.1.", "0.q"], b=["2.q", "rs.2.v"], strict=False,
                                                target_modules=["q_proj", "v_proj"])),
    Row("linear/rank-pattern", "blocks", bdlora(a=["q_proj"], b=["v_proj"], target_modules=["q_proj", "v_proj"],
                                                rank_pattern={"v_proj": 2})),
]


def mirrored(W, n):
    """The blocks in reverse order."""
    height = W.shape[0] // n
    return block_diagonal(np.concatenate([W[i * height:(i + 1) * height] for i in reversed(range(n))]), n)


def repeated(W, n):
    """Every block in every column: what is read as a whole matrix, n times over."""
    return np.tile(W, (1, n))


def interleaved(W, n):
    """Row i belongs to block i mod n."""
    whole = np.zeros((W.shape[0], W.shape[1] * n), W.dtype)
    for i, row in enumerate(W):
        whole[i, i % n * W.shape[1]:(i % n + 1) * W.shape[1]] = row
    return whole


FAULTS = (
    Fault("blocks-in-reverse", "the blocks are read from the last to the first", {"formula": with_factors(mirrored)},
          spares=("linear/one-block",)),
    Fault("no-blocks", "the zeros between the blocks are filled with copies of them",
          {"formula": with_factors(repeated)}, spares=("linear/one-block",)),
    Fault("blocks-interleaved", "consecutive rows are given to different blocks",
          {"formula": with_factors(interleaved)}, spares=("linear/one-block",)),
)

METHOD = Method(
    name="bdlora", peft_type="LORA", title="BD-LoRA", paper="https://arxiv.org/abs/2510.23346",
    equation="W' = W + (alpha / r) B A, A or B block-diagonal", rows=ROWS, shapes=shapes, formula=formula,
    faults=FAULTS,
    tensors=Tensors(neutral={"lora_B.weight": 0.0}),
    laws=Laws(draw={"r": [2, 4], "lora_alpha": [1, 3, 8], "target_modules": [["up", "mid"]],
                    "use_bdlora": [bdlora()["use_bdlora"], bdlora(a=["mid"], b=["up"])["use_bdlora"]]},
              mixed_batch=True, scales=True),
)
