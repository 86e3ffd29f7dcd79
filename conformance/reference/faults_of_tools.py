"""Seeded faults of what a library offers around adapters. As in `faults.py`, each is the oracle, wrong in one way."""

from __future__ import annotations

from . import optimizers
from .faults_of_bookkeeping import ignored, keep_going
from .faults_over_time import f


def other_options(change):
    """An optimizer with other options."""
    return {"optimise": lambda o, right, kind, options, *a: right(kind, {**options, **change(options)}, *a)}


def reduced(change):
    """Intruders reduced by other options."""
    return {"reduce_intruders": lambda o, right, options: right({**options, **change(options)})}


def all_decay(o, right, kind, options, inputs, cotangent, steps):
    before = o.adapters["default"][1]
    right(kind, options, inputs, cotangent, steps)
    config, after = o.adapters["default"]
    rate = options["lr"] * options.get("loraplus_lr_ratio", 1) * options.get("loraplus_weight_decay", 0)
    o.adapters["default"] = config, {k: v - rate * before[k] if k.endswith(".bias") else v for k, v in after.items()}


def own_gram(o, right, kind, options, inputs, cotangent, steps):
    """Each factor's gradient is preconditioned by the factor's own Gram matrix."""
    config, tensors = o.adapters["default"]
    found, slopes = {}, o.gradients(inputs, cotangent)
    for key, value in tensors.items():
        g = slopes.get(key, 0)
        if optimizers.is_A(key):
            g = optimizers.gram(value, options["reg"]) @ g
        elif optimizers.is_B(key):
            g = g @ optimizers.gram(value.T, options["reg"])
        found[key] = value - options["lr"] * g
    o.adapters["default"] = config, found


def trains_A(o, right, *a):
    right(*a)
    o.still = ()


def keeps_the_rest(o, right, options):
    """The reduced adapter is not made smaller again: its rank is whatever the change needs."""
    right({**options, "top_k": 0})


def stays_active(o, right, options):
    held = o.chosen
    right(options)
    o.chosen = held


def swapped_strength(o, right, path, name):
    own = o.adapters[name][0]
    right(path, name)
    config, tensors = o.adapters[name]
    o.adapters[name] = {**config, "lora_alpha": own["lora_alpha"] * config["r"] / own["r"]}, tensors


def state_with_adapter(o, right):
    return {k: o.rounded(v) for k, v in o.folded(o.chosen).items()}


def set_what_is_there(o, right, tensors):
    right({k: tensors.get(k, v) for k, v in o.base_weights.items()})


def unmapped(o, right, key):
    return key


def by_targets(o, right, base, weights, config, tensors, case=""):
    aimed = {k: v for k, v in tensors.items() if k.split(".")[0] in config["target_modules"]}
    return right(base, weights, config, aimed, case)


def mixed_for_use(o, right, path, base, weights, dtype, options):
    right(path, base, weights, dtype, {**options, "is_trainable": False} if options.get("mixed") else options)


def left_on(o, right, merge, names=None):
    kept = o.folded(o.chosen)
    right(merge, names)
    o.base_weights = o.base_weights if merge else kept


def saves_and_enables(o, right, *a):
    right(*a)
    o.off = 0


def first_rank(o, right, names, weights, new, options):
    right(names, weights, new, {"svd_rank": o.adapters[names[0]][0]["r"], **options})


def saves_nothing(o, right, names, *a):
    held = dict(o.adapters)
    o.adapters |= {n: ({**held[n][0], "modules_to_save": None}, held[n][1]) for n in names if n in held}
    right(names, *a)
    o.adapters |= {n: held[n] for n in names}


def add_and_train(o, right, name, config):
    right(name, config)
    o.asked[name] = True


def last_alone(o, right, *a):
    held = o.chosen
    o.chosen = held[-1:]
    try:
        return right(*a)
    finally:
        o.chosen = held


def without_steps(o, right, *a):
    held = o.base
    o.base = {**held, "layers": [[name, kind, {**args, "stride": 1} if "stride" in args else args]
                                 for name, kind, args in held["layers"]]} if "layers" in held else held
    try:
        return right(*a)
    finally:
        o.base = held


def writes_active(o, right, path, name):
    held = o.adapters[name]
    o.adapters[name] = held[0], o.adapters[o.chosen[0]][1]
    try:
        right(path, name)
    finally:
        o.adapters[name] = held


def switch_if_on(o, right, *a):
    if not o.off:
        right(*a)


def added_is_ignored(o, right, path, name):
    if not o.routed:
        right(path, name)


def unsafe(change):
    """Merging safely, of what is finite, with the weights changed."""
    def merge(o, right, names=None):
        right(names)
        o.base_weights = {k: change(v) if v.ndim > 2 else v for k, v in o.base_weights.items()}

    return {"safe_merge": merge}


def tool(function, *ids):
    return tuple(f"usage/tool-{function}-{id}" for id in ids)


FAULTS = {"lora": (
    f("lora-plus-for-all", "LoRA+ has one rate for A and B", other_options(lambda c: {"loraplus_lr_ratio": 1}),
      "usage", tool("lora-plus", "linear-plain", "linear-bias-lora-only")),
    f("lora-plus-embeddings-alike", "LoRA+ has A's rate for factors on embeddings, too", other_options(
        lambda c: {"loraplus_lr_embedding": c.get("lr")}), "usage", tool("lora-plus", "embedding-plain")),
    f("lora-plus-without-decay", "LoRA+ loses the weight decay", other_options(
        lambda c: {"loraplus_weight_decay": 0.0}), "usage", tool("lora-plus", "linear-plain")),
    f("lora-plus-decays-biases", "LoRA+ lets biases decay", {"optimise": all_decay}, "usage",
      tool("lora-plus", "linear-bias-lora-only")),
    f("preconditioned-by-itself", "the preconditioner of A is A's Gram matrix, not B's", {"optimise": own_gram},
      "usage", tool("riemannian", "linear-rank-pattern")),
    f("undamped", "the preconditioner has no damping", other_options(lambda c: {"reg": 1e-9}), "usage",
      tool("riemannian", "linear-rank-pattern")),
    f("lora-fa-trains-a", "LoRA-FA leaves A to be trained", {"optimise": trains_A}, "usage",
      tool("lora-fa", "linear-rslora")),
    f("lora-fa-without-decay", "LoRA-FA loses the weight decay", other_options(lambda c: {"weight_decay": 0}),
      "usage", tool("lora-fa", "linear-rslora")),
    f("intruders-removed", "of intruders, what was to stay goes", reduced(
        lambda c: {"mitigation_lambda": 1 - c["mitigation_lambda"]}), "usage", tool("intruders", "linear-plain")),
    f("intruders-among-all", "intruders are looked for in all directions", reduced(lambda c: {"top_k": 99}), "usage",
      tool("intruders", "linear-plain", "linear-rslora")),
    f("intruders-kept", "no direction is taken for an intruder", {"reduce_intruders": keeps_the_rest}, "usage",
      tool("intruders", "linear-plain")),
    f("intruders-not-active", "the adapter without intruders does not become the active one",
      {"reduce_intruders": stays_active}, "usage", tool("intruders", "linear-plain")),
    f("swapped-rank-old-strength", "an adapter of another rank is scaled as if it had the old alpha and rank",
      {"hotswap": swapped_strength}, "usage", tool("swapped-ranks", "linear-plain")),
    f("ranks-cut", "ranks that are larger are taken to be equal", {"prepare_hotswap": keep_going}, "usage",
      tool("swapped-ranks", "linear-plain")),
    f("base-state-adapted", "the base model's state has the adapter in it", {"base_state": state_with_adapter},
      "usage", ("usage/base-state",)),
    f("base-state-in-part", "a base model's state that lacks tensors is taken", {"set_base_state": set_what_is_there},
      "usage", ("usage/base-state",)),
    f("names-unmapped", "key_mapping is not read", {"mapped": unmapped}, "usage", tool("mapped-names", "linear-plain")),
    f("revision-lost", "get_peft_model does not keep the revision", ignored("build_with", "revision"), "usage",
      tool("revision", "linear-plain")),
    f("put-by-targets", "where a state dict is given, target_modules still choose among its layers",
      {"adapted_like": by_targets}, "usage", ("usage/tool-found-by-state",)),
    f("mixed-is-for-use", "is_trainable is lost on the way to a model for several methods",
      {"restore_with": mixed_for_use}, "usage", ("usage/tool-loaded-mixed",)),
    f("switched-while-off-is-lost", "switching while adapters are off does nothing", {"switch": switch_if_on}, "usage",
      ("usage/switched-while-off",)),
    f("second-of-active-counts", "of several active adapters the last one alone counts", {"forward": last_alone},
      "usage", ("usage/stacked",)),
    f("steps-ignored", "the steps of a convolution are left out", {"forward": without_steps}, "usage", ("usage/gaps",)),
    f("saves-the-active", "saving an adapter that is not active saves the active one", {"write": writes_active},
      "usage", ("usage/saved-inactive",)),
    f("padding-is-trained", "the word that pads is trained as others are",
      {"unpadded": lambda o, right, found, config: found}, "usage", ("usage/unpadded",)),
    f("saved-and-on", "saving switches adapters on", {"save_adapters": saves_and_enables}, "usage",
      ("usage/saved-while-off",)),
    f("svd-of-the-first-rank", "by svd, the first adapter's rank counts, not the largest", {"combine": first_rank},
      "usage", ("usage/combine-smaller-first",)),
    f("saved-twice-combined", "adapters that save the same module are made into one", {"combine": saves_nothing},
      "usage", ("usage/combine-with-saved",)),
    f("second-is-trained", "an adapter that is added is trained, though another one is active", {"add": add_and_train},
      "usage", ("usage/second-untrained",)),
    f("taken-off-stays", "an adapter that is taken off stays in the weights", {"unload": left_on}, "usage",
      ("usage/taken-off",)),
    f("router-without-the-new", "a router does not see an expert that joins", {"load_adapter": added_is_ignored},
      "usage", ("usage/arrow-added", "usage/arrow-added-general")),
    f("safe-merge-of-kernels", "merging safely changes kernels otherwise", unsafe(lambda v: 1.5 * v), "usage",
      ("usage/safely-merged",)),
)}
