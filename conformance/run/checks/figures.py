"""The parameter counts that PEFT's documentation prints, on models without values."""

from __future__ import annotations

import json

from ...reference import store
from ...reference.compare import Failure


def figures() -> list[dict]:
    return json.loads((store.folder() / "figures.json").read_text())["figures"]


def build(driver, figure, config):
    base = {"model": "skeleton", "name": figure["skeleton"]}
    driver.build(base, {}, config, "float32", case=f"figures/{figure['id']}")


def word_for_word(driver, figure):
    """The documented config is accepted as it is printed, keys of former releases included."""
    build(driver, figure, figure["config"])


def count(driver, figure):
    build(driver, figure, {k: v for k, v in figure["config"].items() if k not in figure["legacy_keys"]})
    got = list(driver.count())
    if got != figure["reference"]:
        raise Failure("parameters (trainable, all)", expected=str(figure["reference"]), got=str(got))


KINDS = {"word-for-word": word_for_word, "count": count}
