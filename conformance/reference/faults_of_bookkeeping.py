"""Seeded faults of what is kept about several adapters, and of adapters made of others or of data.

As in `faults.py`, each is the oracle, wrong in one way.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from . import formulas
from .faults_over_time import f, on
from .methods import lora

PLAIN = ("linear/plain",)


def keep_going(o, right, *a):
    return None


def routed(change):
    """Arrow with other options."""
    return {"restore_routed": lambda o, right, *a: right(*a[:-1], {**a[-1], **change(a[-1])})}


def keeps_settings(o, right, name, config):
    right(name, config)
    own, tensors = o.adapters[name]
    held = vars(o).setdefault("settings", {}).setdefault(name, own["lora_alpha"])
    o.adapters[name] = {**own, "lora_alpha": held}, tensors


def trained_if_cast(o, right, path, base, weights, dtype, options):
    right(path, base, weights, dtype, options)
    o.for_training = o.for_training or o.kept != dtype


def deletes_and_tells(o, right, name):
    o.deleted = True
    right(name)


def delete_leaves_none(o, right, name):
    """Of several that are active, deleted one by one, the last leaves none."""
    last = o.chosen == [name] and vars(o).get("several")
    o.several = len(o.chosen) > 1
    right(name)
    if last:
        o.chosen = []


def load_and_switch(o, right, path, name):
    right(path, name)
    o.chosen = [name]


def combined_by_patterns(o, right, names, weights, new, options):
    right(names, weights, new, options)
    config, tensors = o.adapters[new]
    pattern = {**config["alpha_pattern"], **o.adapters[names[0]][0].get("alpha_pattern", {})}
    o.adapters[new] = {**config, "alpha_pattern": pattern}, tensors


def by_beginnings(o, right, base, weights, config, *a, **more):
    """The key of a pattern may be the beginning of a name."""
    known = {f for f in config or () if f.endswith("_pattern") and isinstance(config[f], dict)}
    right(base, weights, {**config, **{f: {k + r"\w*": v for k, v in config[f].items()} for f in known}}, *a, **more)


def off_for_good(o, right, off):
    right(off)
    if not o.off:
        o.asked = dict.fromkeys(o.adapters, False)


def second_by_chance(o, right, name, config):
    right(name, config)
    own, tensors = o.adapters[name]
    o.adapters[name] = own, {k: o.rng.permuted(v.reshape(-1)).reshape(v.shape) for k, v in tensors.items()}


def mixed_strength(o, right, inputs, adapter_names=None):
    held = o.adapters
    if adapter_names is not None:
        alpha = held["default"][0]["lora_alpha"]
        o.adapters = {name: ({**config, "lora_alpha": alpha}, tensors) for name, (config, tensors) in held.items()}
    try:
        return right(inputs, adapter_names)
    finally:
        o.adapters = held


def mixed_strength_of_the_active(o, right, inputs, adapter_names=None):
    held = o.adapters
    if adapter_names is not None:
        alpha = held[o.chosen[0]][0]["lora_alpha"]
        o.adapters = {name: ({**config, "lora_alpha": alpha}, tensors) for name, (config, tensors) in held.items()}
    try:
        return right(inputs, adapter_names)
    finally:
        o.adapters = held


def mixed_keeps_saved(o, right, inputs, adapter_names=None):
    """In a mixed batch, samples without adapter go through the modules that the first adapter saves whole."""
    if adapter_names is None:
        return right(inputs, adapter_names)
    kept = o.base_weights
    saved = formulas.replaced(kept, o.adapters["default"][1])
    y = right(inputs, adapter_names)
    o.base_weights = saved
    try:
        other = right(inputs, adapter_names)
    finally:
        o.base_weights = kept
    return np.stack([other[i] if name is None else y[i] for i, name in enumerate(adapter_names)])


def merges_what_is_infinite(o, right, names=None):
    if any(np.isnan(v).any() for v in o.folded(names or o.chosen).values()):
        right(names)
    o.merge(names)


def generates_adapted(o, right, inputs, count, *a):
    off, o.off = o.off, 0
    try:
        return right(inputs, count, *a)
    finally:
        o.off = off


def thinned(scale):
    return {"thinned": lambda o, right, a, density: right(a, density) * scale(density)}


def converted_otherwise(change):
    """What a checkpoint that was converted holds instead."""
    def save(o, right, path, begun):
        config, now = o.adapters["default"]
        right(path, begun)
        o.adapters["default"] = change(*o.read(path))
        o.write(path, "default")
        o.adapters["default"] = (config, now)

    return {"save_converted": save}


def as_lora_otherwise(change):
    """What is saved as an adapter of LoRA is another one."""
    def save(o, right, path, rank, name="default"):
        held = o.adapters["default"]
        right(path, rank, name)
        o.adapters["default"] = change(*o.read(path))
        o.write(path, "default")
        o.adapters["default"] = held

    return {"save_as_lora": save}


def writes_then_refuses(o, right, path, names=None):
    right(path, [name for name in names or list(o.adapters) if name in o.adapters])
    right(path, names)


def delete_to_the_last(o, right, name):
    was = name in o.chosen
    right(name)
    o.chosen = list(o.adapters)[-1:] if was else o.chosen


def delete_one_to_the_first(o, right, name):
    """Where one active adapter is left of two, the first of all that are left becomes active."""
    left = [a for a in o.chosen if a != name]
    right(name)
    o.chosen = list(o.adapters)[:1] if len(left) == 1 else o.chosen


def wide_output(o, right, inputs, adapter_names=None):
    """The adapter's 32 bits are those of the output, on a base of 16."""
    return right(inputs, adapter_names) * (1 + 2e-6 * (o.dtype == "bfloat16" and o.kept == "float32"))


def begins_somewhere(o, right, base, weights, config, *a, **k):
    """A new adapter's tensors are all drawn, so it changes the model."""
    right(base, weights, config, *a, **k)
    o.adapters = {name: (c, {key: v + 0.05 for key, v in t.items()}) for name, (c, t) in o.adapters.items()}


def orthogonal_begins_somewhere(o, right, base, weights, config, *a, **k):
    """The same, where orthogonal factors are asked for."""
    orthogonal = (config or {}).get("init_lora_weights") == "orthogonal"
    (partial(begins_somewhere, o, right) if orthogonal else right)(base, weights, config, *a, **k)


def merges_for_good_without_bias(o, right, merge, names=None):
    """Weights are merged for good, biases are left as they were."""
    before = o.base_weights
    right(merge, names)
    o.base_weights = {k: before[k] if k.endswith("bias") else v for k, v in o.base_weights.items()}


def names_alone(o, right, base, weights, config, *a, **k):
    """A key of a pattern is a name, and no regular expression."""
    read = {field: {key: x for key, x in v.items() if re.escape(key) == key}
            if field.endswith("_pattern") and isinstance(v, dict) else v for field, v in (config or {}).items()}
    right(base, weights, read or config, *a, **k)


def add_unfreezes(o, right, name, config):
    right(name, config)
    o.asked = {}


def delete_into_base(o, right, name):
    """What was merged stays, though no adapter of that name is left."""
    if name in o.merged:
        o.base_weights, o.merged = o.folded(o.merged), []
    right(name)


def first_config(o, right, name=None):
    return right(name or "default")


def saved_for_use(o, right, path):
    right(path)
    o.adapters = {name: ({**c, "inference_mode": True}, t) for name, (c, t) in o.adapters.items()}


def loaded_for_use(o, right, path, name, options):
    right(path, name, options)
    o.adapters[name] = ({**o.adapters[name][0], "inference_mode": True}, o.adapters[name][1])


def loading_ends_training(o, right, path, name, options):
    right(path, name, options)
    o.training = False


def loaded_untrained(o, right, path, name, options):
    right(path, name, options)
    o.asked[name] = False


def used_is_trained(o, right):
    o.asked = {k: v for k, v in o.asked.items() if v}
    return right()


def strong_by_rank(o, right):
    """An adapter that got another rank keeps its alpha / r."""
    return {k: o.base_weights[k] + (v - o.base_weights[k]) * 1.1 for k, v in right().items()}


def add_then_fail(o, right, name, config):
    """The name is taken before it shows that nothing can be adapted."""
    if name in (taken := vars(o).setdefault("taken", set())):
        raise ValueError(f"{name} is there")
    if name != "default":
        taken.add(name)
    right(name, config)
    taken.discard(name)


def mixed_as_at_first(o, right, inputs, adapter_names=None):
    """Of the layers of an adapter that is not on all of them, those of the first one count."""
    if adapter_names is None:
        return right(inputs, adapter_names)
    first = o.adapters["default"][0]["target_modules"]
    lost = {n for n, (c, _) in o.adapters.items() if not set(first[:1]) & set(c["target_modules"])}
    return right(inputs, [None if n in lost else n for n in adapter_names])


def mixed_anything(o, right, inputs, adapter_names=None):
    """Names that are not there count as none; too few names are filled up."""
    if adapter_names is None:
        return right(inputs, adapter_names)
    names = [n if n in o.adapters else None for n in adapter_names]
    return right(inputs, names + [None] * (len(next(iter(inputs.values()))) - len(names)))


def mixed_when_off(o, right, inputs, adapter_names=None):
    off, o.off = o.off, 0 if adapter_names else o.off
    try:
        return right(inputs, adapter_names)
    finally:
        o.off = off


def mixed_leaves_its_names(o, right, inputs, adapter_names=None):
    """After a batch was refused the next one is for its names."""
    left = vars(o).pop("left", None)
    try:
        return right(inputs, adapter_names or left)
    except Exception:
        o.left = adapter_names
        raise


def tells(change):
    """What is told of the layers and of the model is another thing."""
    def status(o, right):
        found = right()
        for what in (*found["layers"].values(), found["model"]):
            what.update(change(o, what))
        return found

    return {"status": status}


def option(operation, **wrong):
    """An option of loading, saving or adding is read as this, whatever is given."""
    def call(o, right, *a):
        *others, options = a
        return right(*others, {**options, **{k: v for k, v in wrong.items() if k in options}})

    return {operation: call}


def ignored(operation, name):
    def call(o, right, *a, **more):
        *others, options = a
        return right(*others, {k: v for k, v in options.items() if k != name}, **more)

    return {operation: call}


def saved_in_32(o, right, path):
    kept, o.kept = o.kept, "float32"
    right(path)
    o.kept = kept


def card_anew(o, right, path, options):
    Path(path, "README.md").unlink(missing_ok=True)
    right(path, options)


def swapped_but(change):
    """Another adapter takes the place of one, but for something of the old one's."""
    def hotswap(o, right, path, name):
        old = o.adapters[name]
        right(path, name)
        o.adapters[name] = change(old, o.adapters[name])

    return {"hotswap": hotswap}


def swaps_anything(o, right, path, name):
    o.adapters[name] = o.read(path)


def first_layers_alone(o, right, names, weights, new, options):
    """What is made of others is on the first one's layers alone."""
    right(names, weights, new, options)
    config, tensors = o.adapters[new]
    first = o.adapters[names[0]][0]["target_modules"]
    first = first.split("|") if isinstance(first, str) else first
    o.adapters[new] = (config, {k: v * any(f".{t}." in k for t in first) for k, v in tensors.items()})


def combines_what_there_is(o, right, names, weights, new, options):
    there = [(n, w) for n, w in zip(names, weights) if n in o.adapters]
    right([n for n, _ in there], [w for _, w in there], new, options)


def combines_one_way_or_another(o, right, names, weights, new, options):
    try:
        right(names, weights, new, options)
    except Exception:
        right(names, weights, new, {"combination_type": "svd"})


def generates_in_turn(o, right, inputs, count, names=None, beams=1):
    """Beams of a sample are taken for samples."""
    if names and beams > 1:
        names = [n for n in names for _ in range(beams)][:len(names)]
    return right(inputs, count, names, beams)


def merges_all_alone(o, right, names=None):
    """In a model of several methods, unmerging leaves all of them off."""
    right(names)
    if o.mixed and names:
        o.unmerge = lambda: vars(o).update(merged=[], chosen=[n for n in o.chosen if n not in names])


def plain_for(name):
    """The prompt is left out where this is among the inputs."""
    def forward(o, right, inputs, adapter_names=None):
        off, o.off = o.off, o.off or name in inputs
        try:
            return right(inputs, adapter_names)
        finally:
            o.off = off

    return {"forward": forward}


def every_label(o, right, inputs, adapter_names=None):
    """A label that counts for nothing counts as the first class."""
    return right({k: np.maximum(v, 0) if k == "labels" else v for k, v in inputs.items()}, adapter_names)


def two_biases(o, right, name, config):
    right(name, {**config, "bias": "none"})


def converts_for_good(o, right, path, begun):
    right(path, begun)
    o.adapters["default"] = o.read(path)


def second_without(*fields):
    """An adapter that is added to others does not read these fields."""
    def add(o, right, name, config):
        right(name, {k: v for k, v in config.items() if k not in fields} if o.adapters else config)

    return {"add": add}


def indices_in_bytes(o, right, name="default"):
    return {k: v % 256 if "indices" in k else v for k, v in right(name).items()}


FAULTS = {
    "vblora": (f("indices-in-bytes", "which vectors are chosen is saved in a byte", {"saved": indices_in_bytes},
                 "usage", ("usage/small-file",)),),
    "prefix_tuning": tuple(
        f(f"plain-for-{name.replace('_', '-')}", f"the prefix is left out where {name} is given", plain_for(name),
          "usage", ("usage/asked-otherwise",)) for name in ("inputs_embeds", "position_ids")),
    "prompt_tuning": (
        f("every-label-counts", "labels of -100 count as others do", {"forward": every_label}, "usage",
          ("usage/asked-otherwise",)),
        f("short-text-is-padded", "a prompt that begins as a text shorter than itself ends as its last word",
          {"text": lambda o, right, config, count: right(config, min(
              count, len(config["prompt_tuning_init_text"].split())))[np.minimum(np.arange(count), len(
                  config["prompt_tuning_init_text"].split()) - 1)]}, "usage",
          ("usage/text-causal-lm", "usage/text-encoder-decoder")),
        f("long-text-from-its-end", "a prompt that begins as a text longer than itself begins as its end",
          {"text": lambda o, right, config, count: right(config, max(
              count, len(config["prompt_tuning_init_text"].split())))[-count:]}, "usage",
          ("usage/text-causal-lm", "usage/text-encoder-decoder")),
        f("words-are-drawn-numbers", "a prompt that is to begin as words is drawn",
          {"words": lambda o, right, count: right(count) + o.rng.normal(size=(count, 1))}, "usage",
          ("usage/vocabulary",)),
        f("first-words-alone", "a prompt begins as some of the first words", {
            "words": lambda o, right, count: np.resize(np.unique(right(999), axis=0)[:4], right(count).shape)}, "usage",
          ("usage/vocabulary",))),
    "shira": (f("set-scale-adds-up", "set_scale multiplies what the scale is now", {
        "set_scale": lambda o, right, name, factor: right(name, factor * o.factors.get(name, 1))}, "usage",
        ("usage/set-scale-alone",)),),
    "lora": (
    f("second-excludes-nothing", "an adapter that is added to others does not read exclude_modules",
      second_without("exclude_modules"), "usage", ("usage/targets-beside",)),
    f("second-on-all-layers", "an adapter that is added to others does not read layers_to_transform",
      second_without("layers_to_transform", "layers_pattern"), "usage", ("usage/targets-beside",)),
    f("second-of-one-rank", "an adapter that is added to others does not read rank_pattern",
      second_without("rank_pattern"), "usage", ("usage/targets-beside",)),
    f("two-train-biases", "a second adapter that trains biases is taken", {"add": two_biases}, "usage",
      ("usage/second-bias-all", "usage/second-bias-lora-only")),
    f("converts-for-good", "saving an adapter as one for the unchanged weights changes it", {
        "save_converted": converts_for_good}, "usage", ("usage/converted-pissa", "usage/converted-plain")),
    f("conversion-keeps-patterns", "a converted adapter has the alphas by pattern that it had before",
      converted_otherwise(lambda c, t: ({**c, "alpha_pattern": {k: v / 2 for k, v in c["alpha_pattern"].items()}}, t)),
      "usage", ("usage/converted-pissa-patterns",)),
    f("combined-on-the-first-one's-layers", "an adapter made of others is on the first one's layers alone",
      {"combine": first_layers_alone}, "usage",
      ("usage/combine-others-cat", "usage/combine-others-svd", "usage/combine-others-regex")),
    f("combines-what-there-is", "adapters that are not there are left out of one made of others",
      {"combine": combines_what_there_is}, "usage", ("usage/combine-refused",)),
    f("combines-somehow", "what cannot be combined as asked is combined otherwise",
      {"combine": combines_one_way_or_another}, "usage", ("usage/combine-refused",)),
    f("beams-are-samples", "in a mixed batch the beams of a sample are taken for further samples",
      {"generate": generates_in_turn}, "usage", ("usage/generate-mixed",)),
    f("generates-unmixed", "text for a mixed batch is generated with the active adapter", {
        "generate": lambda o, right, inputs, count, names=None, beams=1: right(inputs, count)}, "usage",
      ("usage/generate-mixed",)),
    f("mixed-loses-what-was-merged", "in a model of several methods, what was merged and unmerged is off",
      {"merge": merges_all_alone}, "usage", ("usage/life-with-oft",)),
    f("as-lora-of-the-active", "the active adapter is saved as one of LoRA, whichever is named", {
        "save_as_lora": lambda o, right, path, rank, name="default": right(path, rank, o.chosen[0])}, "usage",
      ("usage/as-lora-by-rank",)),
    f("as-lora-of-all-ranks", "a number of ranks to save as LoRA is not read", {
        "save_as_lora": lambda o, right, path, rank, name="default": right(path, 1.0, name)}, "usage",
      ("usage/as-lora-by-rank",)),
    f("as-lora-share-of-values", "the share of squares to save as LoRA is one more rank", {
        "save_as_lora": lambda o, right, path, rank, name="default": right(
            path, rank if isinstance(rank, int) else min(rank + 0.25, 1.0), name)}, "usage",
      ("usage/as-lora-by-rank",)),
    f("as-lora-without-what-is-whole", "what is saved as LoRA lacks what an adapter trains whole", as_lora_otherwise(
        lambda c, t: ({**c, "modules_to_save": None}, {k: v for k, v in t.items() if "lora_" in k})), "usage",
      ("usage/as-lora-of-all",)),
    f("added-in-the-base's-dtype", "an adapter that is added to others has the base's 16 bits",
      {"add_with": lambda o, right, name, config, options: right(
          name, config, {"autocast_adapter_dtype": False})}, "usage", ("usage/all-dtypes",)),
    f("loaded-beside-in-32-bits", "autocast_adapter_dtype is not read where an adapter is loaded beside others",
      option("load_adapter_with", autocast_adapter_dtype=True), "usage", ("usage/all-dtypes",)),
    f("saved-in-32-bits", "an adapter of 16 bits is saved with 32", {"save": saved_in_32}, "usage",
      ("usage/all-dtypes",)),
    f("base-in-32-bits", "the base's weights have the adapter's dtype", {
        "dtypes": lambda o, right: dict.fromkeys(right(), o.kept)}, "usage", ("usage/all-dtypes",)),
    f("file-overrules-what-is-given", "a config that is given is not read", ignored("restore_with", "config"), "usage",
      ("usage/given-config",)),
    f("given-mode-counts", "inference_mode of a config that is given counts, not is_trainable", {
        "restore_with": lambda o, right, path, base, weights, dtype, options: right(path, base, weights, dtype, {
            **options, "is_trainable": not options.get("config", {}).get("inference_mode", True)})}, "usage",
      ("usage/given-config",)),
    f("always-called-default", "adapter_name is not read", ignored("restore_with", "adapter_name"), "usage",
      ("usage/given-place",)),
    f("subfolder-ignored-beside", "subfolder is not read where an adapter is loaded beside others",
      ignored("load_adapter_with", "subfolder"), "usage", ("usage/given-place",)),
    f("always-safetensors", "safe_serialization is not read", ignored("save_with", "safe_serialization"), "usage",
      ("usage/other-file",)),
    f("card-written-anew", "README.md is written anew at each save", {"save_with": card_anew}, "usage",
      ("usage/card",)),
    f("embeddings-never-saved", "save_embedding_layers is read as False",
      option("save_with", save_embedding_layers=False), "usage", ("usage/embeddings",)),
    f("embeddings-always-saved", "save_embedding_layers=False is not read", {
        "save_with": lambda o, right, path, options: right(path, {
            **options, "save_embedding_layers": options.get("save_embedding_layers") or "auto"})}, "usage",
      ("usage/embeddings",)),
    f("swapped-keeps-its-strength", "an adapter that takes another's place has that one's alpha",
      swapped_but(lambda old, new: ({**new[0], "lora_alpha": old[0]["lora_alpha"]}, new[1])), "usage",
      ("usage/swapped-linear", "usage/swapped-conv2d")),
    f("swapped-keeps-its-layers", "an adapter that takes another's place leaves that one where it has no layer itself",
      swapped_but(lambda old, new: ({**old[0], "lora_alpha": new[0]["lora_alpha"]}, {**old[1], **new[1]})), "usage",
      ("usage/swapped-linear",)),
    f("swaps-anything", "what does not fit takes the place of an adapter", {"hotswap": swaps_anything}, "usage",
      ("usage/swapped-linear",)),
    f("mixed-by-the-first-one's-layers", "in a mixed batch adapters act where the first one's first layer is, or not",
      {"forward": mixed_as_at_first}, "usage", ("usage/mixed-batches-of-many",)),
    f("mixed-when-off", "in a mixed batch adapters act that are off", {"forward": mixed_when_off}, "usage",
      ("usage/mixed-batches-of-many",)),
    f("mixed-anything", "a batch for names that are not there, or too few, is taken", {"forward": mixed_anything},
      "usage", ("usage/mixed-batches-refused", "usage/mixed-batches-refused-unchanged")),
    f("mixed-leaves-its-names", "the names of a batch that was refused are those of the next one",
      {"forward": mixed_leaves_its_names}, "usage", ("usage/mixed-batches-refused-unchanged",)),
    f("merges-the-active-one", "merging for good does not read the names", {
        "unload": lambda o, right, merge, names=None: right(merge)}, "usage", ("usage/merged-by-name",)),
    f("tells-of-all-adapters", "a layer is told to have all adapters of the model",
      tells(lambda o, what: {"available_adapters": sorted(o.adapters)}), "usage", ("usage/status",)),
    f("tells-the-first-as-active", "the first adapter is told to be active",
      tells(lambda o, what: {"active_adapters": [*o.adapters][:1]}), "usage", ("usage/status",)),
    f("tells-what-is-there-as-trained", "every adapter that is there is told to be trained",
      tells(lambda o, what: {"requires_grad": dict.fromkeys(what["requires_grad"], True)}), "usage",
      ("usage/status",)),
    f("tells-nothing-of-merging", "no adapter is told to be merged", tells(lambda o, what: {"merged_adapters": []}),
      "usage", ("usage/status",)),
    f("tells-enabled", "adapters are told to be on when they are off", tells(lambda o, what: {"enabled": True}),
      "usage", ("usage/status",)),
    f("switched-for-use-and-trained", "an adapter that is switched to for use is trained",
      {"switch": lambda o, right, names, for_use=False: right(names)}, "usage", ("usage/status",)),
    f("merges-what-is-infinite", "safe_merge looks for what is no number alone",
      {"safe_merge": merges_what_is_infinite}, "usage", ("usage/safe-merge",)),
    f("pruned-at-random-not-rescaled", "what DARE keeps is not divided by the density",
      thinned(lambda density: density), "usage", ("usage/combine-dare-linear", "usage/combine-dare-ties")),
    f("pruned-at-random-multiplied", "what DARE keeps is multiplied by the density", thinned(lambda d: d * d), "usage",
      ("usage/combine-dare-linear", "usage/combine-dare-ties")),
    f("density-is-what-is-dropped", "DARE drops the share that it is to keep",
      {"thinned": lambda o, right, a, density: right(a, 1 - density) * (1 - density) / density}, "usage",
      ("usage/combine-dare-linear", "usage/combine-dare-ties")),
    f("conversion-adds", "a converted adapter adds what it began as", converted_otherwise(
        lambda c, t: (c, {k: np.where(np.arange(v.shape[1]) < v.shape[1] // 2, v, -v) if "lora_B" in k else v
                          for k, v in t.items()})), "usage", ("usage/converted-pissa", "usage/converted-olora")),
    f("conversion-keeps-alpha", "a converted adapter has the alpha that it had before, at twice the rank",
      converted_otherwise(lambda c, t: ({**c, "lora_alpha": c["lora_alpha"] / 2}, t)), "usage",
      ("usage/converted-pissa", "usage/converted-pissa-rslora")),
    f("conversion-without-rslora", "a converted adapter of rsLoRA has twice its alpha", converted_otherwise(
        lambda c, t: ({**c, "lora_alpha": c["lora_alpha"] * (np.sqrt(2) if c.get("use_rslora") else 1)}, t)), "usage",
      ("usage/converted-pissa-rslora",)),
    f("as-lora-one-short", "what is saved as an adapter of LoRA lacks its last rank", as_lora_otherwise(
        lambda c, t: (c, {k: v * (np.arange(v.shape[1]) < v.shape[1] - 1) if "lora_B" in k else v
                          for k, v in t.items()})), "usage", ("usage/as-lora",)),
    f("as-lora-unscaled", "what is saved as an adapter of LoRA is divided by its rank", as_lora_otherwise(
        lambda c, t: ({**c, "alpha_pattern": {}}, t)), "usage", ("usage/as-lora",)),
    f("generates-when-off", "text is generated with the adapter while it is off", {"generate": generates_adapted},
      "usage", ("usage/generate-masked",)),
    f("writes-then-refuses", "of several names to save those that are there are saved, then the others are refused",
      {"save_adapters": writes_then_refuses}, "usage", ("usage/unknown-name",)),
    f("delete-to-the-last", "deleting the active adapter makes the last one active", {"delete": delete_to_the_last},
      "usage", ("usage/deletion",)),
    f("delete-one-to-the-first", "deleting one of two active adapters makes the first of all active",
      {"delete": delete_one_to_the_first}, "usage", ("usage/one-of-several",)),
    f("output-in-32-bits", "on a base in bfloat16 the output has the adapter's 32 bits", {"forward": wide_output},
      "usage", ("usage/sixteen-bits",)),
    f("lost-where-it-narrows", "a layer that has more inputs than outputs is not adapted",
      {"formula": lambda site, t, c: lora.formula(site, t, c) if site.inp <= site.out else (site.W, site.b)}, "usage",
      ("usage/narrowing",)),
    f("patterns-of-names", "keys of rank_pattern and its like are names, not regular expressions",
      {"build": names_alone}, "usage", ("usage/patterns",)),
    f("deleting-leaves-buffers", "a deleted adapter leaves a buffer",
      {"held": lambda o, right: [*right(), *(["up.norm.other"] if "deleted" in vars(o) else [])],
       "delete": deletes_and_tells}, "usage", ("usage/deleted-whole",)),
    f("cast-is-trained", "an adapter for use is trained where it is cast to 32 bits", {"restore_with": trained_if_cast},
      "usage", ("usage/used-in-16-bits",)),
    f("off-until-a-context-ends", "what was switched off is on when a context ends in which it was off, too",
      {"disable": lambda o, right, off: right(off) if off else setattr(o, "off", 0)}, "usage",
      ("usage/switched-off",)),
    f("name-keeps-its-settings", "an adapter has the alpha of the one that had its name before",
      {"add": keeps_settings}, "usage", ("usage/reused-name",)),
    f("delete-leaves-none", "deleting the last of several active adapters leaves none active",
      {"delete": delete_leaves_none}, "usage", ("usage/one-of-several",)),
    f("combined-in-32-bits", "an adapter made of others has 32 bits, whatever they have", {
        "combine": lambda o, right, names, weights, new, options: (
            right(names, weights, new, options), o.others.update({new: "float32"}))[0]}, "usage",
      ("usage/combine-dtypes",)),
    f("combined-by-patterns", "an adapter made of others has the first one's alpha_pattern",
      {"combine": combined_by_patterns}, "usage", ("usage/combine-patterns",)),
    f("patterns-of-beginnings", "the key of rank_pattern may be the beginning of a layer's name",
      {"build": by_beginnings}, "usage", ("usage/patterns",)),
    f("cast-but-for-the-trained", "cast_mixed_precision_params leaves what is trained in 16 bits",
      {"cast_mixed": lambda o, right, dtype: setattr(o, "dtype", dtype)}, "usage", ("usage/cast-mixed-plain",)),
    f("cast-again-at-once", "of nested calls that inputs stay as they are, the inner one ends both",
      {"casting": lambda o, right, on: setattr(o, "uncast", 0) if on else right(on)}, "usage", ("usage/casting",)),
    f("swapped-without-rslora", "an adapter of rsLoRA that takes another's place is divided by its rank", swapped_but(
        lambda old, new: ({**new[0], "use_rslora": False}, new[1])), "usage", ("usage/swapped-rslora",)),
    f("loaded-is-active", "in a model of several methods the adapter that is loaded becomes the active one",
      {"load_adapter": load_and_switch}, "usage", ("usage/life-with-loha",)),
    f("given-state-ignored", "a state dict that is given is not what is saved",
      {"save_given": lambda o, right, path, factor: right(path, 1)}, "usage", ("usage/given-state",)),
    f("always-cast", "inputs are brought into the adapter's dtype, though that is declined",
      {"casting": keep_going}, "usage", ("usage/casting",)),
    f("never-cast-again", "inputs stay as they are after that was declined for a while",
      {"casting": lambda o, right, on: right(False)}, "usage", ("usage/casting",)),
    f("enabled-untrained", "what was disabled and is enabled again is trained no longer",
      {"disable": off_for_good}, "disable", PLAIN),
    f("second-by-chance", "what a second adapter of the same config begins as is drawn otherwise",
      {"add": second_by_chance}, "usage", ("usage/begins-beside",)),
    f("routed-by-sign", "Arrow takes a token that points the other way for one that does not",
      {"likeness": lambda o, right, x, V: x @ V.T}, "usage", ("usage/arrow-few", "usage/arrow-one")),
    f("routed-to-one-more", "Arrow shares a token among one adapter more than top_k", routed(
        lambda o: {"top_k": min(o["top_k"] + 1, 3)}), "usage", ("usage/arrow-few", "usage/arrow-one")),
    f("routed-at-the-inverse-temperature", "Arrow multiplies likeness by its temperature",
      routed(lambda o: {"router_temperature": 1 / o["router_temperature"]}), "usage",
      ("usage/arrow-few", "usage/arrow-all")),
    f("routed-with-general-knowledge", "Arrow leaves in its adapters what they have in common with the general ones",
      routed(lambda o: {"use_gks": False}), "usage", ("usage/arrow-general",)),
    f("adding-unfreezes", "adding an adapter makes those trainable that were not to be", {"add": add_unfreezes},
      "usage", ("usage/require-grad",)),
    f("orthogonal-begins-somewhere", "new orthogonal factors change the model",
      {"build": orthogonal_begins_somewhere}, "usage", ("usage/begins-orthogonal",)),
    f("merged-for-good-without-bias", "merging for good leaves biases as they were",
      {"unload": merges_for_good_without_bias}, "usage", ("usage/merged-for-good",)),
    f("begins-somewhere", "a new adapter changes the model", {"build": begins_somewhere}, "usage",
      ("usage/begins-as-base",)),
    f("deleted-stays-merged", "deleting a merged adapter leaves it in the base weights", {"delete": delete_into_base},
      "usage", ("usage/deletion",)),
    f("failed-add-takes-the-name", "an adapter that could not be added has taken its name", {"add": add_then_fail},
      "usage", ("usage/failed-add",)),
    f("config-of-the-first", "the first adapter's config counts as the active one's", {"config_of": first_config},
      "usage", ("usage/held-configs",)),
    f("saved-is-for-use", "saving leaves inference_mode in the config", {"save": saved_for_use}, "usage",
      ("usage/held-configs",)),
    f("loaded-is-for-use", "an adapter loaded for training has a config that says otherwise",
      {"load_adapter_with": loaded_for_use}, "usage", ("usage/held-configs",)),
    f("loading-ends-training", "loading an adapter ends training mode, also if it is to be trained",
      {"load_adapter_with": loading_ends_training}, "usage", ("usage/loading-modes",)),
    f("loaded-untrained", "loading an adapter beside others does not read is_trainable",
      {"load_adapter_with": loaded_untrained}, "usage", ("usage/loading-modes",)),
    f("require-grad-of-the-active", "what is trained by name is the active adapter, whichever is named",
      {"require_grad": lambda o, right, names, on: right(o.chosen, on)}, "usage", ("usage/require-grad",)),
    f("used-is-trained", "inference_mode is not read", {"names": used_is_trained}, "usage",
      ("usage/for-use", "usage/for-use-mixed", "usage/for-use-modules-to-save")),
    f("given-overrules-the-file", "what is given beside a file counts more than the file",
      {"read_config": lambda o, right, path, given: {**right(path, {}), **given}}, "config", ("config/beside",)),
    f("fields-in-fields-lost", "a config within a config is read as its defaults", {
        "read_config": lambda o, right, path, given: {k: {} if isinstance(v, dict) else v
                                                      for k, v in right(path, given).items()}}, "config",
      ("config/beside",)),
    f("types-are-llamas", "every type of model has Llama's layers",
      {"by_type": lambda o, right, model_type: right("llama")}, "targets", ("targets/by-type",)),
    f("begun-without-data", "an adapter that is to begin by data is drawn",
      {"state_dict": lambda o, right, *a: {k: o.rng.normal(size=v.shape) * v.std() if o.begun else v
                                           for k, v in right(*a).items()}}, "beginnings",
      ("beginnings/eva-data", "beginnings/corda-ipm", "beginnings/lora-ga-arb2r-stable")),
    f("stronger-by-rank", "an adapter that got another rank is scaled for the old one", {"weights": strong_by_rank},
      "beginnings", ("beginnings/eva-data-redistributed",)),
    f("begun-beside-the-base", "what an adapter begins as is not taken from the base weights",
      {"take_from_base": keep_going}, "beginnings", ("beginnings/corda-ipm", "beginnings/lora-ga-arb2r-stable")),
    f("merges-the-first-of-several", "of several active adapters the first is merged",
      {"merge": lambda o, right, names=None: right(names or o.chosen[:1])}, on("order-of-adapters"), PLAIN),
    f("mixed-strength-of-the-active", "in a mixed batch every sample has the active adapter's strength",
      {"forward": mixed_strength_of_the_active}, "usage", ("usage/mixed-batches",)),
    f("mixed-keeps-saved", "in a mixed batch, samples without adapter go through the modules that adapters save whole",
      {"forward": mixed_keeps_saved}, "usage", ("usage/mixed-batches-saved",)),
    f("mixed-strength-of-the-first", "in a mixed batch every sample has the first adapter's strength",
      {"forward": mixed_strength}, on("mixed-batch"), PLAIN),
)}
