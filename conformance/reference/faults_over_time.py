"""Seeded faults of what happens over time: training and dropout, states, several adapters, ranks that shrink.

As in `faults.py`, each is the oracle, wrong in one way; most are meant for a single law.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from . import dropout, formulas, noise, store
from .method import Fault
from .numpy_model import apply_layer

# Training.


def only_on(o, right, on):
    right(True)


def dropped(keep):
    """`keep(d, site, t, config, x, what is kept)` -> the layer's output, in place of the right one."""
    def drop(o, right, d, site, t, config, x):
        return keep(o, d, site, t, config, x, o.keep(d, site, t, config[d.rate], x))

    return {"drop": drop}


def output_of(o, d, site, t, config, x, keep):
    return dropout.output(d, o.method.formula, site, t, config, x, keep)


def unscaled(o, d, site, t, config, x, keep):
    return output_of(o, d, site, t, config, x, keep * (1 - config[d.rate]))


def base_too(o, d, site, t, config, x, keep):
    W, b = o.method.formula(site, t, config)
    keep = keep.reshape(*keep.shape[:-1], *dropout.places_of_input(site, x))
    return apply_layer(site, x * keep / (1 - config[d.rate]), W, b)


def behind(o, d, site, t, config, x, keep):
    """The delta's output is dropped, not its input."""
    W, b = o.method.formula(site, t, config)
    out = np.resize(keep.reshape(-1, keep.shape[-1])[0], (site.out, *[1] * (W.ndim - 1)))
    return apply_layer(site, x, site.W + (W - site.W) * out / (1 - config[d.rate]), b)


def before_rank_one(o, d, site, t, config, x, keep):
    """The one number between A and B is dropped, so all of the input or nothing."""
    return output_of(o, d, site, t, config, x, np.broadcast_to(keep[..., :1], keep.shape))


def in_linear_alone(o, d, site, t, config, x, keep):
    return output_of(o, d, site, t, {**config, d.rate: 0}, x, keep * 0 + 1) if site.kernel else \
        output_of(o, d, site, t, config, x, keep)


def first_rate(o, right, d, site, t, config, x):
    return right(d, site, t, {**config, d.rate: o.adapters["default"][0][d.rate]}, x)


def one_for_all(o, right, d, site, t, rate, x):
    return right(d, site, t, rate, x[:1, :1])


def always_same(o, right, d, site, t, rate, x):
    o.rng = np.random.default_rng(0)
    return right(d, site, t, rate, x)


def train_scales(o, right, on):
    right(on)
    o.factors = dict.fromkeys(o.adapters, 1.1 if on else 1.0)


def gradients_in_training(o, right, inputs, cotangent):
    return {k: v / 2 if o.training else v for k, v in right(inputs, cotangent).items()}


def step_all(o, right, inputs, cotangent, rate):
    right(inputs, cotangent, rate)
    o.base_weights = {k: v - rate for k, v in o.base_weights.items()}


def step_without_last(o, right, inputs, cotangent, rate):
    config, held = o.adapters["default"]
    right(inputs, cotangent, rate)
    last = sorted(held)[-1]
    o.adapters["default"] = (config, {**o.adapters["default"][1], last: held[last]})


def step_then_stale(o, right, inputs, cotangent, rate):
    """The layers go on with what they had made of the tensors before."""
    frozen = o.folded(["default"])
    right(inputs, cotangent, rate)
    o.folded = lambda names: frozen
    o.run = lambda inputs, names: formulas.output(o.method, o.base, frozen, {}, {}, inputs)


def parts_alike(o, right, d, site, t, config, x):
    return output_of(o, replace(d, apart=""), site, t, config, x, o.keep(d, site, t, config[d.rate], x))


def last_alone(o, right, d, site, t, config, x):
    """Of several adapters, the last one's dropout is left out."""
    rates = [c[d.rate] for c, _ in o.adapters.values()]
    return right(d, site, t, {**config, d.rate: 1e-9} if len(rates) > 1 and config[d.rate] == rates[-1] else config, x)


# States.


def enabled_at_once(o, right, off):
    o.off = int(off)


def all_active(o, right):
    return list(o.adapters)


def trained(which):
    """Live names, `which(oracle, name of the adapter)` deciding what is trained."""
    def names(o, right):
        found = right()
        for adapter in o.adapters:
            for name, on in o.case.parameters.items():
                if on and f".{adapter}." in (live := name.replace(".default.", f".{adapter}.")):
                    found[live] = which(o, adapter)
        return found

    return {"names": names}


def delete_to_none(o, right, name):
    was = name in o.chosen
    right(name)
    o.chosen = [] if was else o.chosen


def delete_switches(o, right, name):
    right(name)
    o.chosen = list(o.adapters)[:1]


def delete_leaves(o, right, name):
    """It is forgotten, but its parameters stay."""
    o.left = [*getattr(o, "left", []), *o.adapters]
    right(name)


def names_left(o, right):
    return {**{k.replace(".default.", f".{a}."): False for a in getattr(o, "left", []) for k in o.case.parameters},
            **right()}


def delete_first_always(o, right, name):
    right(next(iter(o.adapters)))


def merge_active(o, right, names=None):
    right(None)


def merge_again(o, right, names=None):
    o.merged += list(names or o.chosen)


def merge_instead(o, right, names=None):
    o.merged = list(names or o.chosen)


def merged_stays_on(o, right, inputs, adapter_names=None):
    return o.rounded(o.run(inputs, o.merged)) if o.off and o.merged else right(inputs, adapter_names)


def switch_merged(o, right, names):
    o.chosen = list(names)


def unmerge_last(o, right):
    o.merged = o.merged[:-1]


def unload_wrapped(o, right, merge):
    names = o.names() if o.case else {}
    right(merge)
    o.names = lambda: names


# Files of several adapters.


def save_all(o, right, path, names=None):
    right(path)


def save_first_as_all(o, right, path, names=None):
    held = dict(o.adapters)
    o.adapters = {k: (c, o.adapters["default"][1]) for k, (c, _) in held.items()}
    right(path, names)
    o.adapters = held


def save_flat(o, right, path, names=None):
    for name in names or list(o.adapters):
        o.write(path, name)


def load_and_activate(o, right, path, name):
    right(path, name)
    o.chosen = [name]


def load_over(o, right, path, name):
    right(path, name)
    o.adapters["default"] = o.adapters[name]


def without_other_names(o, right, name="default"):
    others = [a for a in o.adapters if a != name]
    return {k: v for k, v in right(name).items() if not any(f".{a}." in f"{k}." for a in others)}


def without_substrings(o, right, name="default"):
    others = [a for a in o.adapters if a != name]
    return {k: v for k, v in right(name).items() if not any(a in k for a in others)}


def without_default(o, right, name="default"):
    return {k.replace(".default", ""): v for k, v in right(name).items()}


# AdaLoRA.


def never(o, right, step):
    return None


def allocate(**changes):
    """With another allocator, whose methods `changes` are."""
    def step(o, right, number):
        config, tensors = o.adapters[o.chosen[0]]
        if o.allocator is None:
            o.allocator = o.method.budget.allocator(config, tensors)
            for name, change in changes.items():
                setattr(o.allocator, name, partial(change, o.allocator))
        right(number)

    return {"allocate": step}


def linear_budget(a, step):
    layers = sum(k.endswith("lora_E") for k in a.average)
    start, end = a.c["tinit"], a.c["total_step"] - a.c["tfinal"]
    return int(layers * (a.c["init_r"] + (a.c["target_r"] - a.c["init_r"]) * (step - start) / (end - start)))


def quadratic_budget(a, step):
    layers = sum(k.endswith("lora_E") for k in a.average)
    start, end = a.c["tinit"], a.c["total_step"] - a.c["tfinal"]
    share = 1 - (step - start) / (end - start)
    return int(layers * (a.c["target_r"] + (a.c["init_r"] - a.c["target_r"]) * share**2))


def by_sensitivity(a, budget):
    a.uncertainty = {k: np.ones_like(v) for k, v in a.uncertainty.items()}
    return type(a).choose(a, budget)


def unpruned(o, right, name="default"):
    return {k: o.rounded(v) for k, v in o.adapters[name][1].items()}


def plain_loss(o, right, inputs, adapter_names=None):
    y = right(inputs, adapter_names)
    return y - o.method.penalty(o.adapters["default"][1], o.adapters["default"][0]) if "labels" in inputs else y


def f(id, what, change, check, cases=("linear/plain",)):
    return Fault(id, what, change, tuple(check.split()), cases)


def on(law):
    return f"law/{law}"


TRAINING = (
    f("dropout-in-evaluation", "evaluation mode goes on dropping", {"train": only_on}, on("dropout")),
    f("dropout-absent", "nothing is dropped in training", dropped(
        lambda o, d, site, t, c, x, keep: output_of(o, d, site, t, {**c, d.rate: 0}, x, keep * 0 + 1)), on("dropout")),
    f("dropout-unscaled", "what is kept is not divided by its share", dropped(unscaled), on("dropout")),
    f("dropout-on-base", "the frozen layer reads the dropped input, too", dropped(base_too), on("dropout")),
    f("dropout-behind", "the delta's output is dropped, not its input", dropped(behind), on("dropout")),
    f("dropout-of-the-hidden", "what A gives is dropped", dropped(before_rank_one), on("dropout")),
    f("dropout-in-linear-alone", "convolutions drop nothing", dropped(in_linear_alone),
      on("dropout-in-convolutions")),
    f("dropout-inverted", "the rate is that of what is kept", {
        "keep": lambda o, right, d, site, t, rate, x: right(d, site, t, 1 - rate, x)}, on("dropout")),
    f("dropout-once-for-all", "one choice for all tokens of all samples", {"keep": one_for_all}, on("dropout")),
    f("dropout-repeats", "every call drops the same", {"keep": always_same}, on("dropout")),
    f("dropout-of-the-first", "every adapter has the first one's rate", {"drop": first_rate}, on("dropout")),
    f("dropout-of-one-alone", "of several active adapters the last drops nothing", {"drop": last_alone},
      on("dropout-together")),
    f("training-scales", "training mode scales the delta", {"train": train_scales}, on("training")),
    f("training-halves-gradients", "gradients are halved in training mode", {"gradients": gradients_in_training},
      on("training")),
    f("step-trains-base", "the base weights are trained, too", {"step": step_all}, on("training")),
    f("step-skips-one", "one trainable tensor is not stepped", {"step": step_without_last}, on("training")),
    f("step-then-stale", "layers keep what they computed from the tensors before", {"step": step_then_stale},
      on("training")),
)
STATES = (
    f("nested-disable", "enabling once enables what was disabled twice", {"disable": enabled_at_once}, "states"),
    f("active-is-all", "all adapters are said to be active", {"active": all_active}, "states"),
    f("all-trained", "adapters that are not active are trained", trained(lambda o, name: not o.off), "states"),
    f("disabled-trained", "adapters are trained while disabled", trained(lambda o, name: name in o.chosen), "states"),
    f("switched-untrained", "switching to an adapter leaves it frozen",
      trained(lambda o, name: name == "default" and name in o.chosen and not o.off), "states"),
    f("delete-to-none", "deleting the active adapter leaves none active", {"delete": delete_to_none}, "states"),
    f("delete-switches", "deleting any adapter makes the first one active", {"delete": delete_switches}, "states"),
    f("delete-leaves", "a deleted adapter's parameters stay", {"delete": delete_leaves, "names": names_left}, "states"),
    f("delete-the-first", "the first adapter is deleted, whatever is named", {"delete": delete_first_always}, "states"),
    f("unload-leaves-wrappers", "unloading leaves wrapped layers", {"unload": unload_wrapped}, "states"),
    f("merge-ignores-names", "the active adapter is merged, whichever is named", {"merge": merge_active},
      on("merging-in-parts")),
    f("merge-again", "what is merged is merged again", {"merge": merge_again}, on("merging-in-parts")),
    f("merge-replaces", "merging a further adapter takes out the one before", {"merge": merge_instead},
      on("merging-in-parts")),
    f("merged-stays-on", "a merged adapter stays on when disabled", {"forward": merged_stays_on},
      on("merging-in-parts")),
    f("switch-stays-merged", "switching leaves the adapter before merged", {"switch": switch_merged},
      on("merging-in-parts")),
    f("unmerge-the-last", "unmerging takes out the last adapter alone", {"unmerge": unmerge_last},
      on("merging-in-parts")),
)
FILES = (
    f("selection-ignored", "all adapters are saved, whichever are asked for", {"save_adapters": save_all},
      on("saved-side-by-side")),
    f("saves-the-first", "the first adapter's tensors are saved for all", {"save_adapters": save_first_as_all},
      on("saved-side-by-side")),
    f("saves-into-one-folder", "adapters are saved over each other", {"save_adapters": save_flat},
      on("saved-side-by-side")),
    f("load-activates", "loading an adapter beside others makes it the active one", {"load_adapter": load_and_activate},
      on("saved-side-by-side")),
    f("load-overwrites", "loading an adapter beside others overwrites the first", {"load_adapter": load_over},
      on("saved-side-by-side")),
    f("keys-without-other-names", "keys that hold another adapter's name as a part are not saved",
      {"state_dict": without_other_names}, on("names-of-adapters")),
    f("keys-without-substrings", "keys that hold another adapter's name anywhere are not saved",
      {"state_dict": without_substrings}, on("saved-side-by-side")),
    f("buffers-unsaved", "of modules that are saved whole, buffers are not",
      {"state_dict": lambda o, right, *a: {k: v for k, v in right(*a).items() if not k.endswith(".centre")}}, "keys",
      ("linear/buffer-to-save",)),
    f("default-cut-out", "'default' is cut out of keys, also where it is a module", {"state_dict": without_default},
      on("names-of-modules")),
)
def allocates_from_the_start(o, right, step):
    """Every so many steps counts from the end of the warm-up."""
    o.adapters = {k: ({**c, "tinit": 0}, t) for k, (c, t) in o.adapters.items()} if o.allocator is None else o.adapters
    right(step)


RANKS = (
    f("quadratic-schedule", "the budget shrinks by a square", allocate(budget=quadratic_budget), "usage",
      ("usage/schedule",)),
    f("no-warm-up", "ranks shrink from the first step on", {"allocate": allocates_from_the_start}, "usage",
      ("usage/schedule",)),
    f("never-allocates", "ranks do not shrink", {"allocate": never}, on("shrinking-ranks"), ()),
    f("linear-schedule", "the budget shrinks linearly", allocate(budget=linear_budget), on("shrinking-ranks"), ()),
    f("uncertainty-ignored", "importance is the average sensitivity alone", allocate(choose=by_sensitivity),
      on("shrinking-ranks"), ()),
    f("checkpoint-unpruned", "checkpoints hold all ranks", {"state_dict": unpruned}, on("shrinking-ranks"), ()),
    f("loss-without-orthogonality", "the loss lacks its further term", {"forward": plain_loss}, on("shrinking-ranks"),
      ()),
)


def never_at_the_last(o, right, step):
    if step < o.adapters[o.chosen[0]][0].get("final_warmup", np.inf):
        right(step)


def linear_choice(a, step):
    a.c = {**a.c, "asa_schedule_exponent": 1.0}
    return type(a).budget(a, step)


def never_forgotten(a, budget):
    held = dict(a.average), dict(a.uncertainty)
    type(a).choose(a, budget)
    a.average, a.uncertainty = held


def chosen_by_layer(a, budget):
    """As many in each layer, whatever the others hold."""
    whole = a.average
    for path in sorted({k.rpartition(".adamss_")[0] for k in whole}):
        a.average = {k: v for k, v in whole.items() if k.startswith(f"{path}.")}
        held = a.uncertainty
        type(a).choose(a, budget // 2)
        a.uncertainty = held
    a.average, a.uncertainty = {}, {}


SUBSPACES = tuple(f(id, what, change, "usage", ("usage/subspaces",)) for id, what, change in (
    ("last-choice-skipped", "no subspace is chosen in the last step of the warm-up", {"allocate": never_at_the_last}),
    ("linear-choice", "the number of subspaces shrinks linearly", allocate(budget=linear_choice)),
    ("importance-stays", "importance goes on from the choice before", allocate(choose=never_forgotten)),
    ("choice-by-layer", "each layer keeps its share", allocate(choose=chosen_by_layer)),
    ("subspaces-all-stay", "all subspaces stay trained", {"allocate": never}),
))


def inputs_of_the_first(o, right, names, weights, new, options):
    right(names, weights, new, options)
    config, tensors = o.adapters[new]
    o.adapters[new] = {**config, "feedforward_modules": o.adapters[names[0]][0].get("feedforward_modules")}, tensors


def keeps_counts(o, right, name, config):
    """How many numbers each layer has is found once for each name."""
    if config.get("proportional_parameters"):
        counts = vars(o).setdefault("counts", {})
        config = {**config, "n_frequency": counts.setdefault(name, config["n_frequency"])}
    right(name, config)


COMBINED = (f("combined-inputs-of-the-first", "an adapter made of others scales those inputs that the first one scales",
              {"combine": inputs_of_the_first}, "usage", ("usage/combine-other-layers",)),)
NAMED = (f("merges-what-is-active", "the active adapter is merged for good, whichever is named",
           {"unload": lambda o, right, merge, names=None: right(merge)}, "usage", ("usage/merged-over",)),)
SHARED = (f("shares-in-strides", "layers share A with every second one, not with the next",
            {"shared_by": lambda o, right, i, stride: i % stride}, "usage", ("usage/shared-factors",)),)
CAST = (f("whole-numbers-are-cast", "indices get the dtype of the base", {
    "state_dict": lambda o, right, *a: {k: np.asarray(v, np.float32) for k, v in right(*a).items()}}, "usage",
          ("usage/autocast",)),)
COUNTS = (f("counts-stay", "an adapter has the proportional numbers of the one that had its name before",
            {"add": keeps_counts}, "usage", ("usage/reused-name",)),)
ROWS_DROPPED = (
    f("module-dropped-in-evaluation", "the delta is left out at random in evaluation, too", {"train": only_on,
      "build": lambda o, right, *a, **k: (right(*a, **k), o.train(True))[0]}, on("dropout"), ()),
    f("rows-unscaled", "kept rows are not divided by their share", dropped(
        lambda o, d, *more: output_of(o, replace(d, scaled=False), *more)), on("dropout"), ()),
    f("rows-are-columns", "the input's entries are dropped, not the weight's rows", dropped(
        lambda o, d, site, t, c, x, keep: output_of(o, replace(d, drops="input"), site, t, c, x, np.resize(
            keep, x.shape[-1]))), on("dropout"), ()),
)


class Halved:
    """Random numbers of half the spread."""

    def __init__(self, rng):
        self.rng = rng

    def __getattr__(self, name):
        return lambda *a, **more: getattr(self.rng, name)(*a, **more) * (0.5 if name in ("normal", "logistic") else 1)


class OneForAll(Halved):
    """The first sample's random numbers, for the whole batch."""

    def __getattr__(self, name):
        def draw(*a, **more):
            found = np.asarray(getattr(self.rng, name)(*a, **more))
            return np.broadcast_to(found[:1], found.shape)

        return draw


def drawing(change):
    """`change(config, random numbers)` -> those that are used."""
    def drawn(o, right, weights, config):
        config, rng = change({**store.defaults(o.method.peft_type), **config}, o.rng)
        return noise.drawn(o.method, weights, config, o.training, rng) or {}

    return {"drawn": drawn}


def rate_of_kept(config, rng):
    return {k: 1 - v if k.endswith(("dropout", "dropout_p")) and v else v for k, v in config.items()}, rng


def never_drawn(o, right, weights, config):
    return {}


def logits_without(o, right, inputs, cotangent):
    return {k: v * (not o.training or "logits" not in k) for k, v in right(inputs, cotangent).items()}


def mask_first(o, right, inputs, *a):
    mask, tokens = inputs["attention_mask"], o.adapters["default"][0]["num_virtual_tokens"]
    moved = np.concatenate([mask, np.ones((len(mask), tokens), int)], 1)[:, tokens:]
    return right({**inputs, "attention_mask": moved}, *a)


def step_apart(o, right, inputs, cotangent, rate):
    ties, o.ties = o.ties, lambda config: False
    try:
        right(inputs, cotangent, rate)
    finally:
        o.ties = ties


def worst(right, base, weights, options):
    everything = right(base, weights, {**options, "top_p": 1.0})
    count = len(right(base, weights, options)["target_modules"])
    return {**everything, "target_modules": everything["target_modules"][::-1][:count]}


ROUTED = tuple(Fault(id, what, change, ("usage",), ("usage/rerouted",)) for id, what, change in (
    ("routing-stays", "how adapters are weighed does not change on a model",
     {"set_routing": lambda o, right, options: None}),
    ("pass-value-by-layers", "the value of the first pass is one by the number of layers",
     {"set_routing": lambda o, right, options: right({k: 1 / len(o.targets(o.adapters["default"][0])) if v is None and
                                                      k == "scaling_pass_value" else v for k, v in options.items()})}),
    ("log-of-the-last", "the log tells of the last run alone",
     {"log_routing": lambda o, right, inputs, runs: right(inputs, 1)}),
    ("log-is-weighed", "the log tells what is left of the weights in the end", {
        "log_routing": lambda o, right, inputs, runs: 1.5 * right(inputs, runs)}),
))
TIED = tuple(f(id, what, change, "usage", cases) for id, what, change, cases in (
    ("ties-are-copies", "an adapter on a tied head is a copy of the embedding's, which goes its own way",
     {"step": step_apart}, ("usage/tied-targets", "usage/tied-saved")),
    ("ties-are-not-read", "ensure_weight_tying is not read", {"ties": lambda o, right, config: False},
     ("usage/tied-targets", "usage/tied-saved", "usage/tied-tokens")),
))
CONDITIONED = (
    f("worst-conditioned", "KappaTune chooses the layers that are conditioned worst",
      {"best_conditioned": lambda o, right, base, weights, options: worst(right, base, weights, options)}, "usage",
      ("usage/conditioned",)),
    f("large-layers-too", "KappaTune chooses among layers of any size",
      {"best_conditioned": lambda o, right, base, weights, options: right(
          base, weights, {**options, "max_dim_size_to_analyze": 1000})}, "usage", ("usage/conditioned",)),
)


def without_own_loss(o, right, inputs, cotangent):
    config, tensors = o.adapters["default"]
    o.adapters["default"] = {**config, "auxiliary_loss_weight": 0.0}, tensors
    try:
        return right(inputs, cotangent)
    finally:
        o.adapters["default"] = config, tensors
        o.told = ((), {})


def noisy(id, what, change):
    return Fault(id, what, change, ("law/noise",))


HALF = noisy("noise-halved", "what is drawn has half its deviation", drawing(lambda c, rng: (c, Halved(rng))))
BATCH = noisy("noise-of-the-batch", "one draw for all samples", drawing(lambda c, rng: (c, OneForAll(rng))))
NEVER = noisy("noise-absent", "nothing is drawn in training", {"drawn": never_drawn})
KEPT = noisy("noise-inverted", "the rate is that of what is kept", drawing(rate_of_kept))
REPEATED = noisy("noise-repeats", "every call draws the same", drawing(lambda c, rng: (c, np.random.default_rng(0))))
PARTS = (Fault("parts-drop-alike", "both pairs read the same dropped input", {"drop": parts_alike},
               ("law/dropout-together",)),)
ROUTER = Fault("router-untrained", "what is drawn has no gradient in training", {"gradients": logits_without},
               ("law/training-reaches-all",))
UNHEARD = Fault("own-loss-untrained", "the small decoder's own loss has no gradient",
                {"live_gradients": without_own_loss}, ("usage",), ("usage/auxiliary-loss",))
PADDING = Fault("padding-is-read", "the mask of a prompt is behind that of the text when text is generated from it",
                {"generate": mask_first}, ("usage",), ("usage/generate-from-padded",))
NOISY = {"gralora": PARTS, "pvera": (HALF, BATCH, NEVER, KEPT, REPEATED),
         "poly": (HALF, BATCH, NEVER, REPEATED, ROUTER), "monteclora": (HALF, NEVER, REPEATED),
         "shadow": (BATCH, NEVER, KEPT, REPEATED, UNHEARD),
         "xlora": (BATCH, NEVER, KEPT, REPEATED, *ROUTED), "p_tuning": (NEVER, KEPT, REPEATED, PADDING)}
def taken_never(o, right, how, known):
    return known


def rescaled_inputs(o, right, tensors, config, inputs):
    config["velora_config"] = {**config["velora_config"], "scale": 1.0}
    return right(tensors, config, inputs)


REBUILT = (
    Fault("inputs-kept", "A's gradient comes from the inputs themselves", {"rebuilding": lambda o, right, *a: {}},
          ("law/rebuilt-inputs",)),
    Fault("direction-stays", "v is never taken from a batch", {"taken": taken_never}, ("law/rebuilt-inputs",)),
    Fault("direction-of-each-batch", "v is that of every batch, whatever init_type says",
          {"taken": lambda o, right, how, known: {}}, ("law/rebuilt-inputs",)),
    Fault("rebuilt-unscaled", "scale is not read", {"rebuilding": rescaled_inputs}, ("law/rebuilt-inputs",)),
)
FAULTS = {"lora": (*TRAINING, *STATES, *FILES, *CONDITIONED, *TIED), "adalora": RANKS, "adamss": SUBSPACES,
          "loha": ROWS_DROPPED, "velora": REBUILT, "waveft": COUNTS, "ia3": COMBINED,
          "ln_tuning": NAMED, "lily": SHARED, "supertuning": CAST, "shira": CAST, **NOISY}
