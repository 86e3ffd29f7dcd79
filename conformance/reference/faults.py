"""Seeded faults of no particular method: wrong bookkeeping around a right formula.

Each is the oracle, wrong in one way. A change is `replacement(oracle, right operation, *arguments)`. Faults of one
method's formula stand in that method's file, those of training, states and several adapters in `faults_over_time.py`,
those of configs in `faults_of_configs.py`, those of bookkeeping in `faults_of_bookkeeping.py`, those of what there is
around adapters in `faults_of_tools.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from . import faults_of_bookkeeping, faults_of_configs, faults_of_tools, faults_over_time, formulas
from .method import KEY, Fault
from .methods import lora, methods

PLAIN, SAVED = ("linear/plain",), ("linear/modules-to-save",)


def half(a):
    return np.asarray(a, np.float64).astype(np.float16).astype(np.float64)


def keep_going(o, right, *a):
    return None


def merge_twice(o, right, names=None):
    o.merged = list(names or o.chosen) * 2


def merge_and_run(o, right, inputs, adapter_names=None):
    return o.rounded(o.run(inputs, o.merged + o.chosen if o.merged else [] if o.off else o.chosen))


def inexact(o, right):
    o.merged = []
    o.base_weights = {k: (v.astype(np.float32) * np.float32(1 + 2e-7)).astype(np.float64)
                      for k, v in o.base_weights.items()}


def rename(o, right, old, new, *a):
    return {k.replace(old, new): v for k, v in right(*a).items()}


def other_keys(*pairs):
    """Saved keys are called otherwise, `new` for `old`, and only those are taken."""
    def other(key):
        for old, new in pairs:
            key = key.replace(old, new)
        return key

    def load(o, right, tensors, name="default"):
        back = {other(k): k for k in o.adapters[name][1]}
        right({back.get(k): v for k, v in tensors.items()}, name)

    return {"state_dict": lambda o, right, *a: {other(k): v for k, v in right(*a).items()}, "load": load}


def held_transposed(which=""):
    """Matrices whose key contains `which` are held, saved and expected the other way round."""
    def other(tensors):
        return {k: np.ascontiguousarray(v.T) if which in k and v.ndim == 2 else v for k, v in tensors.items()}

    def load(o, right, tensors, name="default"):
        right(other(tensors), name)

    return {"state_dict": lambda o, right, *a: other(right(*a)), "load": load}


def by_columns(o, right, tensors, name="default"):
    """The numbers of a matrix are read in the order of its transpose."""
    right({k: np.ascontiguousarray(v).reshape(v.shape[::-1]).T if v.ndim == 2 else v for k, v in tensors.items()}, name)


def without_bias(adapted, running=False):
    """Layers are run without their bias: the adapted ones, or all; `running`: only while the adapter runs."""
    def forward(o, right, inputs, adapter_names=None):
        if not o.adapters or (running and (o.off or o.merged)):
            return right(inputs, adapter_names)
        lost = {f"{path}.bias" for path in o.targets(next(iter(o.adapters.values()))[0])}
        kept, own = o.base_weights, {k for k in o.base_weights if k.endswith("bias")}
        o.base_weights = {k: v * 0 if k in (lost if adapted else own) else v for k, v in kept.items()}
        try:
            return right(inputs, adapter_names)
        finally:
            o.base_weights = kept

    return {"forward": forward}


def load_any(o, right, tensors, name="default"):
    config, own = o.adapters[name]
    fits = {k: np.asarray(v, np.float64) for k, v in tensors.items() if k in own and v.shape == own[k].shape}
    o.adapters[name] = (config, {**own, **fits})


def load_then_refuse(o, right, tensors, name="default"):
    load_any(o, right, tensors, name)
    right(tensors, name)


def load_only(o, right, skip, tensors, name="default"):
    """Strict but for one thing."""
    own = o.adapters[name][1]
    tensors = {k: np.nan_to_num(v) if skip == "finite" else v for k, v in tensors.items()
               if skip != "extra" or k in own}
    right({**own, **tensors} if skip == "missing" else tensors, name)


def save_without(o, right, path, field):
    right(path)
    file = Path(path, "adapter_config.json")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != field}))


def save_half(o, right, path):
    config, tensors = o.adapters["default"]
    o.adapters["default"] = (config, {k: half(v) for k, v in tensors.items()})
    right(path)
    o.adapters["default"] = (config, tensors)


def restore_fresh(o, right, path, base, weights, dtype):
    config = json.loads(Path(path, "adapter_config.json").read_text())
    o.build(base, weights, config, dtype, o.case.id if o.case else f"{o.method.name}/x")


def crash_on_damage(o, right, path, *a):
    data = Path(path, "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")  # of a header that may not be there
    if 8 + size + 40 > len(data) or data[8 + size - 1] is None:
        data[8 + size]  # reads past the end
    return right(path, *a)


def believe_config(o, right, base, weights, config, dtype, case="", seed=0):
    """No check of the config; what is wrong with it goes wrong later or never."""
    if config is not None:
        config = {**config, "peft_type": o.method.peft_type if getattr(o, "method", None) else "LORA"}
        config["target_modules"] = [t for t in config["target_modules"] if t != "nowhere"] or ["up"]
        if isinstance(config.get("r"), int) and config["r"] <= 0:
            config["r"] = 8
    right(base, weights, config, dtype, case, seed)


def add_and_activate(o, right, name, config):
    right(name, config)
    o.chosen = [name]


def load_into_active(o, right, tensors, name="default"):
    right(tensors, o.chosen[0])


def add_over(o, right, name, config):
    """The new adapter's initial tensors are written over all adapters."""
    right(name, config)
    for other in o.adapters:
        o.adapters[other] = (o.adapters[other][0], dict(o.adapters[name][1]))


def delete_resets(o, right, name):
    right(name)
    for other, (config, tensors) in list(o.adapters.items()):
        o.adapters[other] = (config, {k: v * 0 for k, v in tensors.items()})


def last_only(o, right, names):
    right(list(names)[-1:])


def without_last(o, right, inputs, cotangent):
    found = right(inputs, cotangent)
    return {k: v for k, v in found.items() if k != sorted(found)[-1]}


def with_frozen(o, right, inputs, cotangent):
    return {**right(inputs, cotangent), f"{KEY}up.base_layer.weight": np.ones((1, 1))}


def halved(o, right, inputs, cotangent):
    return {k: v / 2 if "lora_A" in k else v for k, v in right(inputs, cotangent).items()}


def mixed_first(o, right, inputs, adapter_names=None):
    return right(inputs, adapter_names and [adapter_names[0]] * len(adapter_names))


def mixed_no_base(o, right, inputs, adapter_names=None):
    return right(inputs, adapter_names and [n or "default" for n in adapter_names])


def copy_loses(o, right):
    right()
    o.adapters = {k: (c, {n: v * 0 for n, v in t.items()}) for k, (c, t) in o.adapters.items()}


def low_precision(o, right, tensors, name="default"):
    right({k: half(v * 1.001) for k, v in tensors.items()}, name)


def half_output(o, right, inputs, adapter_names=None):
    return half(right(inputs, adapter_names))


def not_in_half(o, right, inputs, adapter_names=None):
    return o.rounded(o.run(inputs, [])) if o.dtype == "float16" else right(inputs, adapter_names)


def batch_leak(o, right, inputs, adapter_names=None):
    y = right(inputs, adapter_names)
    return y - 0.01 * y.mean(0, keepdims=True)


def not_fresh(o, right, name, config):
    right(name, config)
    config, tensors = o.adapters[name]
    o.adapters[name] = (config, {k: v + 0.05 for k, v in tensors.items()})


def disabled_keeps_saved(o, right, inputs, adapter_names=None):
    """Adapters are off, modules_to_save are not."""
    if not o.off:
        return right(inputs, adapter_names)
    config, tensors = o.adapters["default"]
    weights = formulas.replaced(o.base_weights, tensors)
    return o.rounded(formulas.output(o.method, o.base, weights, {}, config, inputs))


def scale_with_r(o, right, factor):
    """The new scale is computed from alpha / r, although the config asks for rsLoRA."""
    config = o.adapters["default"][0]
    right(factor / np.sqrt(config.get("r", 8)) if config.get("use_rslora") and factor != 1 else factor)


def loaded_as(**wrong):
    return {"restore_with": lambda o, right, *a: right(*a[:-1], {**a[-1], **wrong})}


def loses_what_was_meta(o, right, path, base, weights, dtype, options):
    right(path, base, weights, dtype, options)
    if options.get("low_cpu_mem_usage"):
        o.adapters = {name: (c, {k: v * 0 for k, v in t.items()}) for name, (c, t) in o.adapters.items()}


def keeps_dtype(dtype, operation="build_with"):
    def cast(o, right, *a, **named):
        right(*a, **named)
        o.kept = dtype

    return {operation: cast}


def keeps_float16(o, right, base, weights, config, dtype, options, case=""):
    """Of 16-bit types, bfloat16 alone is known."""
    right(base, weights, config, dtype, options, case)
    o.kept = dtype if dtype == "float16" else o.kept


def refuse_after_merging(o, right, names=None):
    try:
        right(names)
    except Exception:
        o.merge(names)
        raise


def strength(o, name="default"):
    """alpha / r of an adapter of LoRA."""
    config = o.adapters[name][0]
    return config["lora_alpha"] / config["r"]


def scales_all(o, right, name, factor):
    for each in o.adapters:
        right(each, factor)


def unscale_to_one(o, right, factor=None):
    right(factor)
    if factor is None:
        o.scale(1 / strength(o))


def rescale_for_good(o, right, factor, by_error=False):
    if factor is not None:
        right(factor)


def combine_otherwise(**wrong):
    return {"combine": lambda o, right, names, weights, new, options: right(
        names, weights, new, {**options, **{k: v for k, v in wrong.items() if k in options}})}


def combine_unscaled(o, right, names, weights, new, options):
    right(names, [w / strength(o, name) for w, name in zip(weights, names)], new, options)


def combine_and_use(o, right, names, weights, new, options):
    right(names, weights, new, options)
    o.switch([new])


def on_what_was_not_rounded(o, right, base, weights, config, kind, case=""):
    right(base, weights, config, kind, case)
    if config is not None:
        o.base_weights = {k: np.asarray(v, np.float64) for k, v in weights.items()}


def with_defaults(**wrong):
    def build(o, right, base, weights, config, *more, **named):
        right(base, weights, {**wrong, **config} if config else config, *more, **named)

    return build


def add_untruncated(o, right, name, config):
    before = o.base_weights
    right(name, config)
    o.base_weights = before


def without_diagonal(site, t, c):
    return lora.formula(site, {k: v for k, v in t.items() if k != "lora_diag"}, c)


def second_drawn(o, right, name, config):
    right(name, config)
    if name != "default":
        o.adapters[name] = (config, {k: v + 0.3 for k, v in o.adapters[name][1].items()})


def f(id, what, change, caught_by, cases=PLAIN, link="", **more):
    return Fault(id, what, change, tuple(caught_by.split()), cases, link=link, **more)


GENERAL = (
    f("adapter-ignored", "the adapter has no effect at all", {"load": keep_going}, "forward merge"),
    f("leaks-when-disabled", "the adapter stays on when disabled", {"disable": keep_going}, "disable lifecycle"),
    f("disabled-keeps-saved-modules", "disabling leaves modules_to_save in place", {"forward": disabled_keeps_saved},
      "disable", SAVED, "https://github.com/huggingface/peft/issues/493"),
    f("merged-twice", "merging adds the delta twice", {"merge": merge_twice}, "merge lifecycle",
      link="https://github.com/huggingface/peft/pull/3774"),
    f("merge-does-nothing", "merging changes a copy of the weights", {"merge": keep_going}, "merge",
      link="https://github.com/EricLBuehler/candle-lora/issues/26"),
    f("merged-and-running", "a merged adapter is run, too", {"forward": merge_and_run}, "merge lifecycle",
      link="https://github.com/EricLBuehler/candle-lora/issues/26"),
    f("unmerge-does-nothing", "unmerging leaves the merged weights", {"unmerge": keep_going}, "unmerge"),
    f("unmerge-inexact", "unmerging subtracts, and rounding stays behind", {"unmerge": inexact}, "laws"),
    f("bias-lost", "an adapted layer is run without its own bias", without_bias(True), "forward merge disable"),
    f("bias-lost-while-running", "an adapted layer is run without its own bias, but for when it is merged or off",
      without_bias(True, running=True), "forward"),
    f("every-bias-lost", "all layers are run without their bias", without_bias(False), "forward merge disable"),
    f("read-by-columns", "the numbers of a matrix are read column by column", {"load": by_columns}, "forward merge"),
    f("held-transposed", "all matrices of an adapter are held and saved transposed", held_transposed(), "keys forward"),
    f("b-held-transposed", "lora_B is held and saved as (r, out)", held_transposed("lora_B"), "keys forward"),
    f("a-held-transposed", "lora_A is held and saved as (in, r)", held_transposed("lora_A"), "keys forward"),
    f("keys-with-adapter-name", "saved keys hold the adapter's name",
      other_keys((".weight", ".default.weight")), "keys"),
    f("keys-without-prefix", "saved keys lack base_model.model.", other_keys((KEY, "")), "keys"),
    f("keys-without-weight", "saved keys lack .weight at their end", other_keys((".weight", "")), "keys"),
    f("names-without-base-layer", "the frozen layer keeps its old name",
      {"names": lambda o, right, *a: rename(o, right, ".base_layer", "", *a)}, "names"),
    f("names-adapter-first", "live names are adapter-first, parameter-second",
      {"names": lambda o, right, *a: rename(o, right, "lora_A.default", "default.lora_A", *a)}, "names"),
    f("base-trainable", "the base weights are left trainable",
      {"names": lambda o, right: dict.fromkeys(right(), True)}, "names"),
    f("count-off", "frozen parameters count as trainable", {"count": lambda o, right: (right()[1],) * 2}, "count"),
    f("saved-in-half", "tensors are rounded to 16 bits when saved", {"save": save_half}, "save"),
    f("config-field-lost", "use_rslora is not saved",
      {"save": lambda o, right, path: save_without(o, right, path, "use_rslora")}, "save", ("linear/rslora",)),
    f("restore-ignores-tensors", "loading a checkpoint leaves the initial tensors", {"restore": restore_fresh},
      "save lifecycle laws", link="https://github.com/unslothai/unsloth/issues/2009"),
    f("crash-on-damage", "a damaged file ends in an index error", {"restore": crash_on_damage}, "reject"),
    f("config-believed", "configs are not checked", {"build": believe_config}, "reject"),
    f("missing-accepted", "missing tensors keep their initial values",
      {"load": lambda o, right, *a: load_only(o, right, "missing", *a)}, "reject"),
    f("extra-accepted", "unknown tensors are dropped",
      {"load": lambda o, right, *a: load_only(o, right, "extra", *a)}, "reject"),
    f("nan-accepted", "values that are not finite are replaced",
      {"load": lambda o, right, *a: load_only(o, right, "finite", *a)}, "reject"),
    f("loads-anything", "loading takes what fits and says nothing", {"load": load_any}, "reject"),
    f("refused-too-late", "a bad adapter is refused after half of it was loaded", {"load": load_then_refuse}, "reject"),
    f("add-activates", "adding an adapter makes it the active one", {"add": add_and_activate}, "lifecycle laws"),
    f("loads-into-active", "tensors go to the active adapter, not the named one", {"load": load_into_active},
      "lifecycle"),
    f("add-overwrites", "a new adapter's tensors overwrite the others'", {"add": add_over}, "lifecycle laws"),
    f("delete-resets-others", "deleting one adapter empties the others", {"delete": delete_resets}, "lifecycle laws"),
    f("switch-ignored", "the first adapter stays active", {"switch": keep_going}, "lifecycle laws"),
    f("last-of-several", "of several active adapters only the last runs", {"switch": last_only}, "lifecycle laws"),
    f("gradient-missing", "one trainable tensor has no gradient", {"gradients": without_last}, "gradients"),
    f("gradient-for-frozen", "a frozen weight has a gradient", {"gradients": with_frozen}, "gradients"),
    f("gradient-halved", "A's gradient lacks a factor", {"gradients": halved}, "gradients"),
    f("mixed-uses-first", "a mixed batch uses the first sample's adapter for all", {"forward": mixed_first}, "laws"),
    f("mixed-has-no-base", "a sample without adapter gets the default one", {"forward": mixed_no_base}, "laws"),
    f("copy-loses-adapter", "a deep copy has empty adapters", {"copy": copy_loses}, "laws"),
    f("tensors-in-half", "tensors are held with 11 bits", {"load": low_precision}, "forward merge"),
    f("output-in-half", "the output passes through 16 bits", {"forward": half_output}, "forward"),
    f("ignored-in-half", "in float16 the adapter has no effect", {"forward": not_in_half}, "forward", dtype="float16"),
    f("batch-leak", "samples of a batch leak into each other", {"forward": batch_leak}, "forward laws"),
    f("fresh-not-identity", "a new adapter changes the output", {"add": not_fresh}, "laws"),
    f("set-scale-ignores-rslora", "changing the scale falls back to alpha / r", {"scale": scale_with_r}, "laws",
      ("linear/rslora",), "https://github.com/huggingface/peft/issues/2733"),
)


USAGE = (
    f("loaded-for-training", "a loaded adapter is always trained", loaded_as(is_trainable=True), "usage",
      ("usage/is-trainable",)),
    f("never-for-training", "is_trainable is not read", loaded_as(is_trainable=False), "usage",
      ("usage/is-trainable",)),
    f("meta-tensors-lost", "with low_cpu_mem_usage the tensors of a checkpoint do not arrive",
      {"restore_with": loses_what_was_meta}, "usage", ("usage/low-cpu-mem-usage",)),
    f("adapter-in-the-base's-dtype", "an adapter on a base in 16 bits has 16, too", keeps_dtype("bfloat16"), "usage",
      ("usage/autocast",)),
    f("float16-stays", "an adapter on a base in float16 has 16 bits, one in bfloat16 does not",
      {"build_with": keeps_float16}, "usage", ("usage/autocast",)),
    f("loaded-in-the-base's-dtype", "an adapter loaded onto a base in 16 bits has 16, too",
      keeps_dtype("bfloat16", "restore_with"), "usage", ("usage/autocast",)),
    f("autocast-is-no-choice", "autocast_adapter_dtype is not read", keeps_dtype("float32"), "usage",
      ("usage/autocast",)),
    f("merges-what-is-nan", "safe_merge does not look", {"safe_merge": lambda o, right, names=None: o.merge(names)},
      "usage", ("usage/safe-merge",)),
    f("refuses-after-merging", "safe_merge looks when the weights have changed", {"safe_merge": refuse_after_merging},
      "usage", ("usage/safe-merge",)),
    f("safe-merge-merges-nothing", "safe_merge leaves the weights as they were", {"safe_merge": keep_going}, "usage",
      ("usage/safe-merge",)),
    f("set-scale-is-all", "set_scale sets alpha / r itself",
      {"set_scale": lambda o, right, name, factor: right(name, factor / strength(o, name))}, "usage",
      ("usage/set-scale",)),
    f("set-scale-ignores-rslora-itself", "set_scale falls back to alpha / r, where rsLoRA is asked for",
      {"set_scale": lambda o, right, name, factor: right(name, factor / np.sqrt(o.adapters[name][0].get("r", 8)))},
      "usage", ("usage/set-scale-rslora",)),
    f("set-scale-multiplies", "set_scale multiplies what the scale is now",
      {"set_scale": lambda o, right, name, factor: right(name, factor * o.factors.get(name, 1))}, "usage",
      ("usage/set-scale",)),
    f("set-scale-of-all", "set_scale sets that of all adapters", {"set_scale": scales_all}, "usage",
      ("usage/set-scale",)),
    f("unscale-resets", "unscale_layer(factor) sets the scale back",
      {"unscale": lambda o, right, factor=None: right()}, "usage", ("usage/set-scale",)),
    f("unscale-to-one", "unscale_layer() leaves a scale of 1, not of alpha / r", {"unscale": unscale_to_one}, "usage",
      ("usage/set-scale",)),
    f("rescaled-for-good", "the scale stays as it was for a while", {"rescale": rescale_for_good}, "usage",
      ("usage/rescale",)),
    f("rescaled-where-it-fails", "the scale stays as it was for a while if what was done meanwhile failed",
      {"rescale": lambda o, right, factor, by_error=False: None if by_error else right(factor)}, "usage",
      ("usage/rescale",)),
    f("rescaled-from-alpha", "a multiplier for a while forgets what was set before",
      {"rescale": lambda o, right, factor, by_error=False: (o.unscale(), right(factor))[1]}, "usage",
      ("usage/rescale",)),
    f("combined-unscaled", "adapters are combined without their alpha / r", {"combine": combine_unscaled}, "usage",
      ("usage/combine-linear", "usage/combine-cat", "usage/combine-svd")),
    f("negative-weights-lost", "a negative weight counts as a positive one",
      {"combine": lambda o, right, names, weights, *a: right(names, list(np.abs(weights)), *a)}, "usage",
      ("usage/combine-linear-negative", "usage/combine-cat", "usage/combine-svd")),
    f("density-ignored", "nothing is pruned", combine_otherwise(density=1.0), "usage",
      ("usage/combine-ties", "usage/combine-magnitude-prune", "usage/combine-magnitude-prune-svd")),
    f("majority-ignored", "signs are weighed by size where they should be counted",
      combine_otherwise(majority_sign_method="total"), "usage", ("usage/combine-ties-frequency",)),
    f("ties-are-sums", "TIES sums all, whatever their sign", combine_otherwise(combination_type="magnitude_prune"),
      "usage", ("usage/combine-ties", "usage/combine-ties-frequency")),
    f("all-ranks-kept", "svd_rank is not read", combine_otherwise(svd_rank=None), "usage",
      ("usage/combine-svd-rank", "usage/combine-ties-svd")),
    f("combined-becomes-active", "the adapter made of others becomes the active one", {"combine": combine_and_use},
      "usage", ("usage/combine-linear",)),
    f("order-of-methods", "of two methods on a layer the inner one is taken for the outer",
      {"switch": lambda o, right, names: right(list(names)[::-1])}, "usage", ("usage/mixed-with-oft",)),
    f("kasa-untruncated", "KaSA leaves the smallest singular values in the weight", {"add": add_untruncated}, "usage",
      ("usage/kasa",)),
    f("kasa-unlearned", "KaSA's numbers between B and A are left out", {"formula": without_diagonal}, "usage",
      ("usage/kasa",)),
    f("kasa-no-penalty", "KaSA's further term is 0", {"penalty": lambda o, right: 0.0}, "usage", ("usage/kasa",)),
    f("another-default-alpha", "without lora_alpha, it is 16", {"build": with_defaults(lora_alpha=16)}, "usage",
      ("usage/defaults",)),
    f("another-default-rank", "without r, it is 4", {"build": with_defaults(r=4)}, "usage", ("usage/defaults",)),
    f("second-adapter-drawn", "a second adapter begins as something", {"add": second_drawn}, "usage",
      ("usage/begins-as-base",)),
    f("on-what-was-not-rounded", "an adapter puts the layer back as it was before it was quantised",
      {"build_quantised": on_what_was_not_rounded}, "usage", ("usage/nf4", "usage/fp4")),
)


def other_reflections(o, right, name, config):
    right(name, config)
    config, tensors = o.adapters[name]
    o.adapters[name] = (config, {k: o.rng.normal(size=v.shape) for k, v in tensors.items()})


ALL_SAVED = Fault("saves-what-a-seed-gives", "what a seed determines is saved, whatever the config says",
                  {"is_unsaved": lambda o, right, *a: False}, ("usage",), ("usage/unsaved",))
NO_DIVERGENCE = Fault("no-divergence", "nothing holds the distributions to their priors",
                      {"penalty": lambda o, right: 0.0}, ("usage",), ("usage/divergence",))
NOT_TWICE = Fault("every-reflection-once", "a new adapter's reflections are all different",
                  {"add": other_reflections}, ("law/fresh-is-identity",))


def all_faults():
    """(method, fault) for every seeded fault of the suite."""
    found = [(m, fault) for m in methods().values() for fault in m.faults]
    found += [(m, ALL_SAVED) for m in methods().values() if m.tensors.unsaved]
    found += [(methods()["monteclora"], NO_DIVERGENCE), (methods()["hra"], NOT_TWICE)]
    for more in (faults_over_time.FAULTS, faults_of_configs.FAULTS, faults_of_bookkeeping.FAULTS,
                 faults_of_tools.FAULTS):
        found += [(methods()[name], fault) for name, faults in more.items() for fault in faults]
    return [*((methods()["lora"], fault) for fault in (*GENERAL, *USAGE)), *found]
