"""Text that goes on in the likeliest way, word by word."""

from __future__ import annotations

import functools

import numpy as np

START = 1  # the word that a decoder beside an encoder begins with


def encoder_alone(prompt):
    """A prompt in front of what an encoder reads: PEFT puts none before what a decoder says."""
    @functools.wraps(prompt)
    def joined(*args, **more):
        return {k: v for k, v in prompt(*args, **more).items() if k != "decoder_tokens"}

    return joined


def likeliest(output, base, inputs, count) -> tuple[np.ndarray, float]:
    """(the ids, how much likelier than the second they are at least), `output(inputs)` being the logits.

    A decoder goes on with `input_ids`; one that reads what an encoder makes of them begins at START.
    """
    inputs, least, said = dict(inputs), np.inf, "input_ids"
    if base["model"] == "encoder_decoder":
        said = "decoder_input_ids"
        inputs[said] = np.full((len(inputs["input_ids"]), 1), START)
    for _ in range(count):
        y = output(inputs)
        second, first = np.sort(y[:, -1], -1)[:, -2:].T
        least = min(least, (first - second).min())
        inputs[said] = np.concatenate([inputs[said], y[:, -1:].argmax(-1)], 1)
        if said == "input_ids" and "attention_mask" in inputs:
            inputs["attention_mask"] = np.pad(inputs["attention_mask"], [(0, 0), (0, 1)], constant_values=1)
    return inputs[said], least
