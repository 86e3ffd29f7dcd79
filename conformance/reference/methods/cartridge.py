"""Cartridges: Eyuboglu et al., 2025, https://arxiv.org/abs/2506.06266: keys and values in front, the first ones frozen.

What is joined is a prefix as in prefix tuning; its own are the frozen tokens, the attention sinks of section 3.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import formulas
from ..method import Fault, Laws, Method, Prompt, Row, Tensors
from .prefix_tuning import DIM, GROUPED, LAYERS, prompt, shared


def fixed(key, shape, c):
    """The first rows of the prefix are frozen."""
    rows = np.arange(shape[0]) < c.get("num_frozen_tokens", 1)
    return rows[:, None] if key == "prompt_embeddings" else np.zeros((1,) * len(shape), bool)


def without_scores(t, c):
    """Keys of the frozen tokens without direction: attention sees them, but not what they are."""
    P = t["prompt_embeddings"].copy().reshape(-1, LAYERS, 2, c.get("token_dim", DIM))
    P[: c.get("num_frozen_tokens", 1), :, 0] = 0
    return prompt({**t, "prompt_embeddings": P.reshape(len(P), -1)}, c)


def trained_only(t, c):
    n = c.get("num_frozen_tokens", 1)
    return {"past": [(keys[:, n:], values[:, n:]) for keys, values in prompt(t, c)["past"]]}


def all_trained(o, right, inputs, cotangent):
    method = replace(o.method, tensors=replace(o.method.tensors, fixed=None))
    config, tensors = o.adapters["default"]
    found = formulas.gradients(method, o.base, o.base_weights, tensors, config, inputs, cotangent)
    return {k: o.rounded(v) for k, v in found.items()}


def frozen_together(o, right, paths, path):
    right(paths, path)
    parts = [json.loads(Path(p, "adapter_config.json").read_text())["num_frozen_tokens"] for p in paths]
    file = Path(path, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_frozen_tokens": sum(parts)}))


def cartridge(n, task="CAUSAL_LM", **more):
    return {"task_type": task, "num_virtual_tokens": n, **more}


NONE_FROZEN = ("causal-lm/none-frozen",)
ROWS = [
    Row("causal-lm/plain", "causal-lm", cartridge(3), "core", second={}),
    Row("causal-lm/two-frozen", "causal-lm", cartridge(5, num_frozen_tokens=2), "core"),
    Row("causal-lm/none-frozen", "causal-lm", cartridge(4, num_frozen_tokens=0)),
    Row("causal-lm/grouped", "causal-lm-grouped", cartridge(4, **GROUPED)),
    Row("encoder/features", "encoder", cartridge(3, "FEATURE_EXTRACTION"),
        inputs={"attention_mask": {"values": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}}),
]

FAULTS = (
    Fault("composed-frozen-together", "a composed cartridge freezes as many tokens as its parts do together",
          {"compose": frozen_together}, caught_by=("usage",), cases=("usage/composed",)),
    Fault("begins-as-the-last", "a cartridge that begins as a longer cache takes its last keys and values",
          {"begin_as": lambda o, right, cache: right({
              k: v[:, :, -o.adapters["default"][0]["num_virtual_tokens"]:] for k, v in cache.items()})},
          caught_by=("usage",), cases=("usage/begun-as-cache",)),
    Fault("all-tokens-trained", "the frozen tokens have gradients", {"gradients": all_trained},
          caught_by=("gradients",), spares=NONE_FROZEN, gradient_only=True),
    Fault("frozen-keys-empty", "the frozen tokens have values but no keys", {"prompt": without_scores},
          caught_by=("forward",), spares=NONE_FROZEN),
    Fault("frozen-tokens-dropped", "the frozen tokens are left out", {"prompt": trained_only}, caught_by=("forward",),
          spares=NONE_FROZEN),
)

METHOD = Method(
    name="cartridge", peft_type="CARTRIDGE", title="Cartridges", paper="https://arxiv.org/abs/2506.06266",
    equation="K' = [F_K; T_K; K], V' = [F_V; T_V; V]", rows=ROWS, shapes=lambda site, c: {}, faults=FAULTS,
    merges=False,
    tensors=Tensors(shared=shared, fixed=fixed),
    prompt=Prompt(formula=prompt),
    laws=Laws(draw={"num_virtual_tokens": [2, 5], "num_frozen_tokens": [0, 1], "task_type": ["CAUSAL_LM"]},
              stacks=False, bases=("causal-lm",)),
)
