"""Seeded faults of what follows from a config: which layers it means, what files hold, what a new adapter holds.

As in `faults.py`, each is the oracle, wrong in one way; most are LoRA's, which has every rule.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from . import rules
from .method import Fault


def listed(config):
    layers = config["layers_to_transform"]
    return [layers] if isinstance(layers, int) else layers


def believe_targets(o, right, base, weights, config, *a, **k):
    """What a config means is not checked: some layer is adapted."""
    nothing = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    right(base, weights, {**config, **nothing, "target_modules": ["up"]}, *a, **k)


def of_each_layer(field, wrong):
    """A new adapter whose patterns were read by another rule."""
    def add(o, right, name, config):
        if patterns := config.get(field):
            values = {p: wrong(patterns, p) for p in o.targets(config)}
            config = {**config, field: {re.escape(p): v for p, v in values.items() if v is not None}}
        right(name, config)
    return {"add": add}


def longest(patterns, path):
    return next((patterns[p] for p in sorted(patterns, key=len, reverse=True) if rules.of_pattern({p: 1}, path, 0)),
                None)


def rule(**change):
    return {"rules": change}


def f(id, what, change, caught_by, cases):
    return Fault(id, what, change, tuple(caught_by.split()), cases)


ROW = "targets/"
TARGETS = (
    f("name-is-any-end", "a name means whatever ends with it, without a dot before it",
      rule(named=lambda name, path: path.endswith(name)), "targets", (ROW + "one-name", ROW + "names")),
    f("name-is-any-part", "a name means whatever holds it", rule(named=lambda name, path: name in path), "targets",
      (ROW + "one-name", ROW + "part-of-a-name-is-none")),
    f("name-is-the-last-part", "a name with a dot means nothing",
      rule(named=lambda name, path: path.rpartition(".")[2] == name), "targets", (ROW + "some-of-a-path",)),
    f("name-is-a-whole-path", "a name means the path alone", rule(named=lambda name, path: path == name), "targets",
      (ROW + "one-name", ROW + "names")),
    f("regex-is-searched", "a regular expression may match any part of a path",
      rule(matched=lambda pattern, path: re.search(pattern, path)), "targets",
      (ROW + "regex-is-no-name", ROW + "regex-is-the-whole-path", ROW + "regex-from-the-start")),
    f("regex-is-a-beginning", "a regular expression may end before the path does",
      rule(matched=lambda pattern, path: re.match(pattern, path)), "targets", (ROW + "regex-is-no-name",)),
    f("regex-is-an-end", "a regular expression may begin after a dot",
      rule(matched=lambda pattern, path: re.match(rf"(.*\.)?({pattern})$", path)), "targets",
      (ROW + "regex-is-no-name", ROW + "regex-from-the-start")),
    f("excludes-nothing", "exclude_modules is not read", rule(excluded=lambda path, config: False), "targets",
      (ROW + "names", ROW + "exclude-by-regex", ROW + "all-linear-but-some")),
    f("excludes-any-end", "exclude_modules means whatever ends so, without a dot before it",
      rule(excluded=lambda path, config: path.endswith(tuple(config.get("exclude_modules") or ["-"]))), "targets",
      (ROW + "all-linear-but-some",)),
    f("excludes-by-part-of-a-regex", "a regular expression of exclude_modules may match any part of a path",
      rule(excluded=lambda path, config: isinstance(config.get("exclude_modules"), str)
           and re.search(config["exclude_modules"], path)), "targets", (ROW + "exclude-by-part-of-a-regex",)),
    f("excludes-by-the-beginning", "a regular expression of exclude_modules may end before the path does",
      rule(excluded=lambda path, config: isinstance(config.get("exclude_modules"), str)
           and re.match(config["exclude_modules"], path)), "targets", (ROW + "exclude-by-the-beginning-of-a-regex",)),
    f("parameter-is-any-end", "a name of a parameter means whatever ends with it, without a dot before it",
      rule(named=lambda name, path: path.endswith(name)), "targets", (ROW + "parameters",)),
    f("parameter-is-a-whole-path", "a name of a parameter means its whole path alone",
      rule(named=lambda name, path: path == name), "targets", (ROW + "parameters", ROW + "parameter-by-path")),
    f("many-names-cut-short", "of many names, their last parts count", rule(
        named=lambda name, path: rules.named(name.rpartition(".")[2] if name.count(".") > 2 else name, path)),
      "targets", (ROW + "many-names",)),
    f("all-linear-without-conv1d", "all-linear leaves out Conv1D", rule(
        spared=lambda base: {n for n, kind, _ in base["layers"] if kind == "Conv1D"}), "targets",
      (ROW + "all-linear-conv1d",)),
    f("excludes-whole-paths", "exclude_modules means whole paths alone",
      rule(excluded=lambda path, config: path in (config.get("exclude_modules") or ())), "targets", (ROW + "names",)),
    f("saved-needs-a-dot", "modules_to_save means whole parts of a path",
      rule(saved_whole=rules.named), "targets", (ROW + "names", ROW + "saved-without-a-dot")),
    f("saved-is-adapted-too", "modules_to_save are adapted as well, if they are targets",
      rule(within_saved=lambda path, names: False), "targets", (ROW + "saved-beats-targeted", ROW + "saved-parent")),
    f("saved-spares-itself-alone", "what is in a module to save is adapted",
      rule(within_saved=lambda path, names: any(rules.named(name, path) for name in names)), "targets",
      (ROW + "saved-parent",)),
    f("head-is-not-saved", "the head of the task is not trained", rule(whole=lambda c: c.get("modules_to_save") or []),
      "targets", (ROW + "all-linear-spares-the-classifier",)),
    f("all-linear-takes-the-output", "all-linear adapts the output layer", rule(spared=lambda base: set()), "targets",
      (ROW + "all-linear-spares-the-output",)),
    f("all-linear-takes-no-head", "all-linear leaves out whatever is called a head",
      rule(spared=lambda base: {n for n, _, _ in base["layers"] if n.endswith("head")}), "targets",
      (ROW + "all-linear", ROW + "all-linear-spares-the-output")),
    f("last-number-is-the-layer", "of several numbers in a path the last one is the layer's",
      rule(in_layers=lambda path, c: (re.findall(r"\.(\d+)\.", path) or [""])[-1] in map(str, listed(c))), "targets",
      (ROW + "first-number-is-the-layer", ROW + "any-list-of-layers")),
    f("layers-of-any-list", "layers_pattern is not read",
      rule(in_layers=lambda path, c: rules.layer_of(path, []) in listed(c)), "targets",
      (ROW + "layers", ROW + "several-lists-of-layers")),
    f("first-pattern-of-layers", "of several names in layers_pattern the first counts",
      rule(in_layers=lambda path, c: rules.in_layers(path, {**c, "layers_pattern": c["layers_pattern"][:1]})),
      "targets", (ROW + "several-lists-of-layers",)),
    f("layers-begin-so", "layer 10 counts as layer 1",
      rule(in_layers=lambda path, c: any(f"s.{i}" in path for i in listed(c))), "targets",
      (ROW + "layers", ROW + "any-list-of-layers")),
    f("all-layers", "layers_to_transform is not read", rule(in_layers=lambda path, c: True), "targets",
      (ROW + "layers", ROW + "any-list-of-layers")),
    f("last-pattern-of-ranks", "of several patterns that fit the last counts",
      of_each_layer("rank_pattern", lambda ps, p: rules.of_pattern(dict(reversed(ps.items())), p, None)), "targets",
      (ROW + "first-of-two-ranks",)),
    f("longest-pattern-of-ranks", "of several patterns that fit the longest counts",
      of_each_layer("rank_pattern", longest), "targets", (ROW + "first-of-two-ranks",)),
    f("ranks-of-any-part", "a pattern of ranks fits any part of a path", of_each_layer(
        "rank_pattern", lambda ps, p: next((v for k, v in ps.items() if re.search(k, p)), None)), "targets",
      (ROW + "ranks",)),
    f("ranks-by-name-alone", "a pattern of ranks is no regular expression", of_each_layer(
        "rank_pattern", lambda ps, p: next((v for k, v in ps.items() if rules.named(k, p)), None)), "targets",
      (ROW + "ranks", ROW + "first-of-two-ranks")),
    f("alphas-of-any-end", "a pattern of alphas needs no dot before it", of_each_layer(
        "alpha_pattern", lambda ps, p: next((v for k, v in ps.items() if p.endswith(k)), None)), "targets",
      (ROW + "strengths",)),
    f("alphas-by-whole-path", "a pattern of alphas fits whole paths alone", of_each_layer(
        "alpha_pattern", lambda ps, p: ps.get(p)), "targets", (ROW + "strengths", ROW + "rank-and-alpha")),
    f("means-nothing-accepted", "a config that matches no layer is taken", {"build": believe_targets}, "targets",
      (ROW + "matches-nothing", ROW + "excludes-everything", ROW + "regex-with-layers")),
)


def rewritten(change):
    """Saving, and then changing what the config's file holds."""
    def save(o, right, path):
        right(path)
        file = Path(path, "adapter_config.json")
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return {"save": save}


def reading(change):
    """Loading, as if the config's file held something else."""
    def restore(o, right, path, *a):
        file = Path(path, "adapter_config.json")
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
        right(path, *a)
    return {"restore": restore}


def filled(change):
    return {"full_config": lambda o, right, config: change(right(config), config)}


def without(*fields):
    return lambda held: {k: v for k, v in held.items() if k not in fields}


def strict(held):
    if "a_field_of_a_later_release" in held:
        raise ValueError("an unknown field")
    return held


def save_for_good(o, right, path):
    """The live model is put into inference mode as well."""
    right(path)
    o.for_training = False


def stay_trainable(o, right, path, *a):
    right(path, *a)
    o.for_training = True


CONFIGS = ("config/defaults", "config/given", "config/file")
FILE, GIVEN = ("config/file",), ("config/given",)
FILES = (
    f("any-value", "fields out of range are taken", {"is_refused": lambda o, right, config: False}, "refused",
      ("refused/linear", "refused/conv2d", "refused/parameter")),
    f("another-default", "a default is another one", filled(lambda full, given: {"r": 16} | full | (
        {} if "r" in given else {"r": 16})), "config", CONFIGS[:1]),
    f("default-of-the-method", "lora_dropout is 0.05 where it is not given",
      filled(lambda full, given: full | ({} if "lora_dropout" in given else {"lora_dropout": 0.05})), "config",
      CONFIGS[:2]),
    f("none-for-empty", "an empty pattern is held as null",
      filled(lambda full, given: {k: None if v == {} else v for k, v in full.items()}), "config", CONFIGS[:1]),
    f("given-is-lost", "lora_alpha keeps its default", filled(lambda full, given: full | {"lora_alpha": 8}), "config",
      GIVEN),
    f("given-changes-others", "lora_alpha follows r where it is not given", filled(
        lambda full, given: full | ({} if "lora_alpha" in given else {"lora_alpha": full["r"]})), "config", GIVEN),
    f("flag-is-lost", "lora_bias keeps its default", filled(lambda full, given: full | {"lora_bias": False}),
      "config", GIVEN),
    f("field-is-not-held", "use_rslora is in no file", filled(lambda full, given: without("use_rslora")(full)),
      "config", GIVEN),
    f("defaults-not-written", "fields with their defaults are not written to the file",
      rewritten(lambda held: {k: v for k, v in held.items() if v not in (False, None, {})}), "config", FILE),
    f("file-is-for-training", "the file says inference_mode false",
      rewritten(lambda held: held | {"inference_mode": False}), "config", ("config/file", "config/inference")),
    f("no-auto-mapping", "the file does not name the base model's class",
      rewritten(lambda held: held | {"auto_mapping": None}), "config", FILE),
    f("half-an-auto-mapping", "the file does not name the base model's module",
      rewritten(lambda held: held | {"auto_mapping": {"base_model_class": "Net"}}), "config", FILE),
    f("no-version", "the file does not name the release that wrote it",
      rewritten(lambda held: held | {"peft_version": None}), "config", FILE),
    f("names-are-text", "a list of names is written as text",
      rewritten(lambda held: held | {"target_modules": str(held["target_modules"])}), "config save", FILE),
    f("type-of-the-class", "peft_type is written as the class's name",
      rewritten(lambda held: held | {"peft_type": "LoraConfig"}), "config save", FILE),
    f("unknown-field-refused", "a field of a later release is refused", reading(strict), "config",
      ("config/unknown-field",)),
    f("absent-means-one", "a field that is not in the file is 1",
      reading(lambda held: held if "use_rslora" in held else {**held, "use_rslora": True}), "config",
      ("config/sparse-file",)),
    f("given-not-read", "lora_alpha is not read from the file", reading(without("lora_alpha")), "config",
      ("config/sparse-file", "config/unknown-field")),
    f("saving-ends-training", "saving leaves the model in inference mode", {"save": save_for_good}, "config",
      ("config/inference",)),
    f("loaded-is-trainable", "a loaded adapter is trained without being asked for it", {"restore": stay_trainable},
      "config", ("config/inference",)),
)



def changed(slot, change):
    """A new adapter whose tensors of this name are others."""
    def state_dict(o, right, name="default"):
        return {k: change(o, np.asarray(v)) if o.begun and slot in k else v for k, v in right(name).items()}
    return {"state_dict": state_dict}


def begins(id, what, change, *cases, method="lora"):
    return method, Fault(id, what, change, ("beginnings",), tuple(f"beginnings/{c}" for c in cases))


def normal(o, v):
    return np.random.default_rng(o.seed).normal(size=v.shape) * v.std()


def uniform(o, v):
    return np.random.default_rng(o.seed).uniform(-1, 1, v.shape) * np.sqrt(3) * v.std()


def always_the_same(o, v):
    return np.random.default_rng(v.size).uniform(-1, 1, v.shape) / np.sqrt(v.shape[1])


def weights_stay(o, right):
    return {k: v * 0 + 0.1 if o.begun else v for k, v in right().items()}


BEGINNINGS = (
    begins("kaiming-without-a", "A is drawn as by kaiming_uniform_ with a = 0, sqrt(6) times as wide",
           changed("lora_A", lambda o, v: v * np.sqrt(6)), "default", "conv2d"),
    begins("normal-for-uniform", "A is normal where it should be uniform", changed("lora_A", normal), "default"),
    begins("uniform-for-normal", "A is uniform where it should be normal", changed("lora_A", uniform), "gaussian"),
    begins("gaussian-root-r", "gaussian: the deviation is 1 / sqrt(r), not 1 / r",
           changed("lora_A", lambda o, v: v * 4), "gaussian"),
    begins("b-drawn", "B is not 0", changed("lora_B", lambda o, v: v + 1e-3), "default", "gaussian", "bias"),
    begins("a-zero", "A is 0, too", changed("lora_A", lambda o, v: v * 0), "default"),
    begins("same-at-every-start", "the random state is not read", changed("lora_A", always_the_same), "default"),
    begins("same-in-every-layer", "every layer begins with the same numbers",
           changed("vblora_logits", lambda o, v: np.random.default_rng(o.seed).normal(size=v.shape) * 0.1),
           "default", method="vblora"),
    begins("not-orthogonal", "B is drawn, and not orthogonal",
           changed("adamss_newB", lambda o, v: normal(o, v)), "default", method="adamss"),
    begins("key-zero-is-none", "a key of 0 counts as none", changed("vera_A", lambda o, v: np.random.default_rng(
        o.seed).uniform(-0.25, 0.25, v.shape)), "key-zero", method="vera"),
    begins("conv1d-turned", "PiSSA takes the weight of Conv1D as that of a linear layer",
           changed("lora_A", lambda o, v: v[:, ::-1]), "pissa-conv1d"),
    begins("singular-values-in-a", "PiSSA: A holds the singular values, not their roots",
           changed("lora_A", lambda o, v: v * 2), "pissa", "pissa-rslora"),
    begins("residual-not-taken", "PiSSA and OLoRA leave the base weight as it is", {"weights": weights_stay},
           "pissa", "olora", "olora-scaled"),
    begins("d-initial-ignored", "lambda_d is 0.1 whatever d_initial says",
           changed("lambda_d", lambda o, v: v * 0 + 0.1), "d-initial", method="vera"),
    begins("magnitude-one", "the magnitude is 1, not the norm of the weight",
           changed("magnitude", lambda o, v: v * 0 + 1), "default", "conv2d", method="dora"),
    begins("key-ignored", "the projection does not depend on its key",
           changed("vera_A", lambda o, v: np.random.default_rng(3).uniform(-0.25, 0.25, v.shape)),
           "default", method="vera"),
    begins("bound-ignored", "the bank is drawn within 0.02 whatever its bound",
           changed("bank", lambda o, v: v * 0.04), "bounds", method="vblora"),
)
FAULTS: dict[str, tuple] = {"lora": (*TARGETS, *FILES)}
for _method, _fault in BEGINNINGS:
    FAULTS[_method] = (*FAULTS.get(_method, ()), _fault)
