"""An embedding and a head of one weight, and adapters that stay one: `ensure_weight_tying`."""

from __future__ import annotations

import tempfile

import numpy as np

from ...reference import formulas, tying
from ...reference.bases import BASES
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter, draw_base, draw_inputs, rng_of
from ...reference.methods import lora
from .goldens import same_set

TIED: dict[str, tuple[dict, list]] = {  # config, and what there is of the embedding
    "targets": ({"target_modules": ["q_proj", "embed_tokens"]}, ["lora_embedding_A", "lora_embedding_B"]),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, ["weight"]),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}, [tying.TOKENS])}
RATE = 0.1


def tied(driver, what):
    """It begins, runs, is trained, saved and loaded as one; a step follows the gradients of both."""
    base, rng, method = BASES["causal-lm-tied"], rng_of(f"tied {what}"), lora.METHOD
    weights, inputs = draw_base(base, rng), draw_inputs(base, {}, rng)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "ensure_weight_tying": True,
              **TIED[what][0]}
    driver.build(base, weights, config, "float32", case=f"lora/tied-{what}")
    held = own(driver.state_dict())
    there = {tying.EMBEDDING + slot: np.empty(0) for slot in TIED[what][1]}
    same_set("saved keys of a new adapter on the embedding and the head", [k for k in held if "q_proj" not in k],
             own(tying.both(there)))
    one(held, "of a new adapter")
    tensors = own(tying.both(draw_adapter(method, held, set(), rng)))
    driver.load(tensors)
    output = formulas.output(method, base, weights, tying.both(tensors), config, inputs)
    close("output", driver.forward(inputs), output, "float32")
    cotangent = rng.normal(size=output.shape)
    found = formulas.gradients(method, base, weights, tying.both(tensors), config, inputs, cotangent)
    driver.step(inputs, cotangent, RATE)
    got, summed = own(driver.state_dict()), tying.summed(found)
    one(got, "after a step")
    for key in tensors:
        close(f"{key} after a step", got[key], tensors[key] - RATE * summed[key], "float32", floor=1)
    stepped = driver.forward(inputs)
    close("output after a step", stepped, formulas.output(method, base, weights, tying.both(got), config, inputs),
          "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, base, weights, "float32")
    close("output after saving and loading", driver.forward(inputs), stepped, "float32")


def own(tensors: dict) -> dict:
    """Those of the adapter: PEFT saves embeddings that are adapted, too; the tokens of the head are the embedding's."""
    return {k: v for k, v in tensors.items() if ".base_layer." not in k and k != tying.HEAD + tying.TOKENS}


def one(tensors: dict, when: str) -> None:
    for key, value in tying.both(tensors).items():
        if key in tensors and not np.array_equal(tensors[key], value):
            raise Failure(f"{key} {when} is not what the embedding's is")


def everything():
    for what in TIED:
        yield lora.METHOD, f"tied-{what}", lambda driver, what=what: tied(driver, what)
