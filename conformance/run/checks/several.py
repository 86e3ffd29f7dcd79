"""Several adapters in one model: batches in which each sample names its own, text that such batches generate, what the
library tells of the layers, and merging for good by name.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from ...reference import arrow as routing
from ...reference import formulas, store
from ...reference.bases import BASES
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter, draw_base, draw_inputs, rng_of
from ...reference.method import KEY
from ...reference.methods import methods
from ...reference.numpy_model import run
from . import bookkeeping
from .bookkeeping import trained
from .goldens import load_drawn, same_set, start
from .reject import refuse

NAMES = ("third", "default", None, "other", "third", None, "default")


def longer(inputs: dict, count: int) -> dict:
    """A batch of as many samples, no two of which are the same."""
    rng = rng_of("longer")
    found = {}
    for name, value in inputs.items():
        value = np.resize(value, (count, *np.shape(value)[1:]))
        found[name] = value + 0.25 * rng.normal(size=value.shape) if value.dtype.kind == "f" else np.stack(
            [np.roll(v, i) if v.ndim else v for i, v in enumerate(value)])
    return found


def added(driver, case, method) -> dict:
    """Put the adapters "other" and "third" beside the case's, each on one of its layers; name -> (config, tensors)."""
    start(driver, case, "float32")
    found = {"default": (case.config, case.tensors("adapter"))}
    targets = case.config["target_modules"]
    ranks = {"r": case.config["r"] - 1} if method.name in ("lora", "dora") else {}
    for name, target, more in (("other", targets[-1:], ranks), ("third", targets[:1], {})):
        config = bookkeeping.second_of(case, method, target_modules=target, **more)
        driver.add(name, config)
        tensors = load_drawn(driver, method, rng_of(name), name)
        found[name] = config, tensors
    return found


def outputs_of(adapters, case, method, inputs) -> dict:
    """Name, or None -> the output with that adapter."""
    found = {name: formulas.output(method, case.base, case.tensors("base"), tensors, config, inputs)
             for name, (config, tensors) in adapters.items()}
    return {**found, None: formulas.output(methods()["lora"], case.base, case.tensors("base"), {}, {}, inputs)}


def mixed_batches_of_many(driver, case, method):
    """A batch of three adapters and none, in no order, where each adapter is on other layers."""
    adapters = added(driver, case, method)
    inputs = longer(case.tensors("input"), len(NAMES))
    alone = outputs_of(adapters, case, method, inputs)
    driver.switch(["other"])
    for what, names in (("", NAMES), (" again", NAMES[::-1]), (" of one adapter", ["third"] * len(NAMES)),
                        (" of none", [None] * len(NAMES))):
        close(f"output of a batch{what} for {[*names]}, another being active", driver.forward(inputs, [*names]),
              np.stack([alone[name][i] for i, name in enumerate(names)]), "float32")
    close("output after such batches", driver.forward(inputs), alone["other"], "float32")
    driver.disable(True)
    close("output of such a batch while adapters are off", driver.forward(inputs, [*NAMES]), alone[None], "float32")


def ready(driver, case, method):
    """A model that has answered a batch of three adapters; the inputs, and what "other" makes of them."""
    adapters = added(driver, case, method)
    inputs = longer(case.tensors("input"), len(NAMES))
    driver.switch(["other"])
    driver.forward(inputs, [*NAMES])
    return inputs, outputs_of(adapters, case, method, inputs)["other"]


WRONG = {"an adapter that is not there": ["nobody", *NAMES[1:]], "fewer samples than there are": [*NAMES[1:]]}


def mixed_batches_refused(driver, case, method):
    """Batches that name no adapter, or too few, or where one is merged."""
    for what, names in WRONG.items():
        inputs, _ = ready(driver, case, method)
        refuse(f"a batch for {what}", partial(driver.forward, inputs, names))
    if method.merges:
        inputs, _ = ready(driver, case, method)
        driver.merge()
        refuse("a batch for several adapters, one being merged,", lambda: driver.forward(inputs, [*NAMES]))


def mixed_batches_refused_unchanged(driver, case, method):
    """After a batch was refused the model is as before."""
    inputs, alone = ready(driver, case, method)
    for what, names in WRONG.items():
        refuse(f"a batch for {what}", partial(driver.forward, inputs, names))
        close(f"output after a batch for {what} was refused", driver.forward(inputs), alone, "float32")


def merged_by_name(driver, case, method):
    """Adapters that are not active, merged for good by their names; the others go."""
    adapters = added(driver, case, method)
    inputs = case.tensors("input")
    alone = outputs_of(adapters, case, method, inputs)
    driver.unload(True, ["other"])
    close("output after merging for good an adapter that was not active", driver.forward(inputs), alone["other"],
          "float32")


def put_beside(driver, case, method):
    """Put an adapter "other" beside the case's, which is the active one; what the output with the other is to be."""
    start(driver, case, "float32")
    config = bookkeeping.second_of(case, method)
    driver.add("other", config)
    driver.switch(["other"])  # an adaption prompt is loaded where it is active
    tensors = load_drawn(driver, method, rng_of("beside"), "other")
    driver.switch(["default"])
    return formulas.output(method, case.base, case.tensors("base"), tensors, config, case.tensors("input"))


def switched_while_off(driver, case, method):
    """An adapter that is switched to, or deleted, while adapters are off is on, or gone, when they are on again."""
    inputs, want = case.tensors("input"), put_beside(driver, case, method)
    driver.disable(True)
    driver.switch(["other"])
    driver.disable(False)
    close("output when adapters are on again, another having been switched to while they were off",
          driver.forward(inputs), want, "float32")
    driver.switch(["default"])
    driver.disable(True)
    driver.delete("other")
    driver.disable(False)
    bookkeeping.same_output(driver, case, "output when they are on again, the other one having been deleted meanwhile")


def saved_while_off(driver, case, method):
    """Saving all adapters while they are off leaves them off, and the active one active."""
    start(driver, case, "float32")
    driver.add("other", bookkeeping.second_of(case, method))
    driver.disable(True)
    with tempfile.TemporaryDirectory() as path:
        driver.save_adapters(path)
    close("output after saving while adapters are off", driver.forward(case.tensors("input")),
          case.tensors("plain")["y"], "float32")
    driver.disable(False)
    bookkeeping.same_output(driver, case, "output when they are on again after that")


def saved_inactive(driver, case, method):
    """Saving an adapter that is not the active one saves that one's tensors."""
    inputs, want = case.tensors("input"), put_beside(driver, case, method)
    with tempfile.TemporaryDirectory() as path:
        driver.save_adapters(path, ["other"])
        bookkeeping.same_output(driver, case, "output after saving an adapter that is not active")
        driver.restore(str(Path(path, "other")), case.base, case.tensors("base"), "float32")
    close("output of the adapter that was saved while it was not active", driver.forward(inputs), want, "float32")


def stacked(driver, case, method):
    """In every case, two active adapters add up, and so they do merged."""
    for case in store.packs()[method.name].cases:
        c = case.config
        beside = {"modules_to_save", "trainable_token_indices", "task_type"} & {k for k, v in c.items() if v}
        if beside or c.get("bias", "none") != "none" or not case.agreed or not case.merges or (
                case.data["base_name"] == "parameters"):
            continue
        start(driver, case, "float32")
        driver.add("other", bookkeeping.second_of(case, method))
        tensors = {k: v if method.tensors.is_frozen(k) else 0.75 * v for k, v in case.tensors("adapter").items()}
        driver.load(tensors, "other")
        driver.switch(["default", "other"])
        base = case.tensors("base")
        weights = formulas.adapted(method, case.base, base, case.tensors("adapter"), c)[0]
        want = formulas.output(method, case.base, weights, tensors, bookkeeping.second_of(case, method),
                               case.tensors("input"), frozen=base)
        close(f"output of {case.id} with two active adapters", driver.forward(case.tensors("input")), want, "float32")
        driver.merge()
        close(f"output of {case.id} with two merged adapters", driver.forward(case.tensors("input")), want, "float32")


def second_untrained(driver, case, method):
    """Of another adapter nothing is trained until it is switched to, and then of the first one nothing."""
    start(driver, case, "float32")
    own = bookkeeping.trained(driver.names())
    driver.add("other", {**case.config, **method.laws.second})
    same_set("what is trained after adding another adapter", bookkeeping.trained(driver.names()), own)
    driver.switch(["other"])
    left = sorted(set(bookkeeping.trained(driver.names())) & set(own))
    if left:
        raise Failure("what is trained of the first adapter after switching to another one", "nothing", str(left))


def told(adapters: dict, paths, active, merged=(), on=True, trains=True) -> dict:
    """What is to be told of layers at `paths`: `adapters` names those that each adapter is on."""
    def trained(name):
        return trains and on and name in active

    layers = {}
    for path in paths:
        there = sorted(name for name, at in adapters.items() if path in at)
        layers[path] = {"enabled": on, "active_adapters": list(active), "available_adapters": there,
                        "merged_adapters": [name for name in merged if name in there],
                        "requires_grad": {name: trained(name) for name in there}}
    return {"layers": layers, "model": {
        "num_adapter_layers": len(layers), "enabled": on, "active_adapters": list(active),
        "available_adapters": sorted(adapters), "merged_adapters": sorted(merged),
        "requires_grad": {name: trained(name) for name in adapters}}}


def status(driver, case, method):
    """What the library tells of each layer and of the model, while adapters are added, switched, merged and deleted."""
    def check(what, *active, merged=(), on=True, trains=True):
        got, want = driver.status(), told(at, paths, active, merged, on, trains)
        numbers = list(driver.count())
        if (tells := [got["model"].pop(k, None) for k in ("trainable_params", "total_params")]) != numbers:
            raise Failure(f"numbers of parameters that are told {what}", expected=str(numbers), got=str(tells))
        for part, held in (("the model", (got["model"], want["model"])),
                           *((path, (got["layers"].get(path, {}), want["layers"][path])) for path in paths)):
            wrong = {k: held[0].get(k, "nothing") for k in held[1] if held[0].get(k, "nothing") != held[1][k]}
            if wrong:
                raise Failure(f"what is told of {part} {what}: {', '.join(wrong)}",
                              expected=str({k: held[1][k] for k in wrong}), got=str(wrong))
        if more := sorted(set(got["layers"]) - set(paths)):
            raise Failure(f"layers that are told of {what}", expected=str(sorted(paths)), got=str(more))

    paths, targets = list(case.targets), list(case.config["target_modules"])
    driver.build(case.base, case.tensors("base"), case.config, "float32", case=case.id)
    at = {"default": set(paths)}
    check("of a new adapter", "default")
    driver.add("other", bookkeeping.second_of(case, method, target_modules=targets[:1]))
    at["other"] = {path for path in paths if path.rpartition(".")[2] == targets[0]}
    check("after adding another", "default")
    driver.switch(["other"])
    check("after switching to it", "other")
    driver.disable(True)
    check("while it is off", "other", on=False)
    driver.disable(False)
    check("when it is on again", "other")
    driver.switch(["default"])
    if method.merges:
        driver.merge()
        check("while merged", "default", merged=["default"])
        driver.unmerge()
    driver.switch(["default"], True)
    check("after switching to an adapter for use", "default", trains=False)
    driver.switch(["other"])
    driver.delete("default")
    del at["default"]
    check("after deleting the first", "other")


def of_two(first, second):
    """(method, tensors, config) of two cases' adapters, and a function that gives the output with some of these."""
    def output(*adapters):
        weights = first.tensors("base")
        for method, tensors, config in adapters:
            weights = formulas.adapted(method, first.base, weights, tensors, config)[0]
        return run(first.base, weights, first.tensors("input"))

    one, two = ((methods()[c.pack.data["method"]], c.tensors("adapter"), c.config) for c in (first, second))
    return one, two, output


def mixed_life(driver, first, second):
    """Adapters of two methods in one model: what is active and trained, merging by name, deleting."""
    base, inputs = first.tensors("base"), first.tensors("input")
    one, two, output = of_two(first, second)

    def now(what, active, *adapters):
        close(f"output {what}", driver.forward(inputs), output(*adapters), "float32")
        if (got := list(driver.active())) != active:
            raise Failure(f"the active adapters {what}", expected=str(active), got=str(got))
        names = driver.names()
        own = {name: [k for k in names if f".{name}." in f"{k}."] for name in ("default", "other")}
        if not own["default"]:
            raise Failure(f"live parameter names {what}: none is of the first adapter", got=str(sorted(names)))
        same_set(f"what is trained {what}", [k for k in own["default"] + own["other"] if names[k]],
                 [k for name in active for k in own[name] if names[k] or first.parameters.get(k)
                  or second.parameters.get(k.replace(".other", ".default"))])

    with tempfile.TemporaryDirectory() as path:
        start(driver, second, "float32")
        driver.save(path)
        driver.build_with(first.base, base, first.config, "float32", {"mixed": True}, case=first.id)
        driver.load(first.tensors("adapter"))
        now("of a new model", ["default"], one)
        driver.load_adapter(path, "other")
        now("after loading an adapter of another method", ["default"], one)
        driver.switch(["other"])
        now("after switching to the one that was loaded", ["other"], two)
        driver.delete("other")
        now("after deleting the active one, which was loaded", ["default"], one)
    driver.add("other", second.config)
    driver.load(second.tensors("adapter"), "other")
    now("after adding an adapter of another method", ["default"], one)
    driver.switch(["other"])
    now("after switching to it", ["other"], two)
    driver.switch(["default", "other"])
    now("of both", ["default", "other"], one, two)
    driver.merge(["default"])
    driver.unmerge()
    now("after merging one of them, and unmerging", ["default", "other"], one, two)
    driver.switch(["default"])
    now("after switching back", ["default"], one)
    driver.merge(["default"])
    driver.switch(["other"])
    now("after switching to the other, the first one being merged", ["other"], two)
    driver.switch(["default"], True)
    if on := trained(driver.names()):
        raise Failure("what is trained after switching to an adapter for use", "nothing", str(on))
    driver.switch(["default"])
    driver.delete("other")
    now("after deleting the other", ["default"], one)


def mixed_apart(driver, first, second):
    """Three adapters of two methods in one model, each on other layers: deleting one of the active ones, and merging
    for good one that is not active."""
    base, inputs, targets = first.tensors("base"), first.tensors("input"), list(first.config["target_modules"])
    one, two = (methods()[case.pack.data["method"]] for case in (first, second))
    places = {"default": (one, {**first.config, "target_modules": targets[:1]}), "other": (two, second.config),
              "third": (one, {**first.config, "target_modules": targets[-1:]})}
    made: dict = {}

    def put():
        for name, (method, config) in places.items():
            if name == "default":
                driver.build_with(first.base, base, config, "float32", {"mixed": True}, case=f"{one.name}/apart")
            else:
                driver.add(name, config)
            made[name] = method, load_drawn(driver, method, rng_of(f"apart {name}"), name), config

    def now(what, *names):
        weights = base
        for name in names:
            weights = formulas.adapted(made[name][0], first.base, weights, *made[name][1:])[0]
        close(f"output {what}", driver.forward(inputs), run(first.base, weights, inputs), "float32")

    put()
    for name in places:
        driver.switch([name])
        now(f"of the adapter {name}", name)
    driver.switch(list(places))
    now("of all three", *places)
    driver.delete("other")
    if (left := sorted(driver.active())) != ["default", "third"]:
        raise Failure("the active adapters after one of three was deleted", "['default', 'third']", str(left))
    now("of the two that are left", "default", "third")
    put()
    driver.switch(["default"])
    driver.unload(merge=True, names=["other"])
    now("after merging for good one that was not active", "other")


def generate_mixed(driver, case, method, likeliest, count):
    """Text for a batch in which one sample has an adapter and one has none, word by word and in beams."""
    start(driver, case, "float32")
    driver.add("other", {**case.config, **method.laws.second})
    driver.switch(["other"])
    alone = {"default": likeliest(case, method, case.tensors("adapter"))[0],
             None: likeliest(case, methods()["lora"], {})[0]}
    for beams in (1, 2):
        for names in (["default", None], [None, "default"], [None, None]):
            got = np.asarray(driver.generate(case.tensors("input"), count, names, beams))
            want = np.stack([alone[name][i] for i, name in enumerate(names)])
            if not np.array_equal(got, want):
                raise Failure(f"ids generated for {names} in {beams} beams", expected=str(want.tolist()),
                              got=str(got.tolist()))


def tokens(driver, case, method):
    """Two adapters that train different words, both active: as they run, merged one after the other, and taken out."""
    base, inputs = case.tensors("base"), case.tensors("input")
    start(driver, case, "float32")
    before, indices = driver.weights(), case.config["token_indices"]
    config = {**case.config, "token_indices": [i + 1 for i in indices]}
    driver.add("other", config)
    drawn = draw_adapter(method, driver.state_dict("other"), set(), rng_of("tokens"))
    driver.load(drawn, "other")
    driver.switch(["default", "other"])
    first = formulas.adapted(method, case.base, base, case.tensors("adapter"), case.config)[0]
    want = formulas.output(method, case.base, first, drawn, config, inputs)
    close("output of two adapters that train different words", driver.forward(inputs), want, "float32")
    driver.merge(["default", "other"])
    close("output of both, merged at once", driver.forward(inputs), want, "float32")
    driver.unmerge()
    driver.merge(["default"])
    driver.merge(["other"])
    close("output of both, merged one after the other", driver.forward(inputs), want, "float32")
    driver.unmerge()
    for name, got in driver.weights().items():
        close(f"{name} after unmerging both", got, before[name], "float32")
    close("output after unmerging both", driver.forward(inputs), want, "float32")
    driver.add("same", case.config)
    driver.merge(["default"])
    refuse("merging an adapter of words that are merged already", partial(driver.merge, ["same"]))


def embedding_found(driver, case, method):
    """Where no module is named, tokens are those of the model's own embedding, whatever that is called."""
    base, rng = BASES["words"], rng_of("words")
    weights, inputs, config = draw_base(base, rng), draw_inputs(base, {}, rng), {**case.config}
    del config["target_modules"]
    driver.build(base, weights, config, "float32", case=f"{method.name}/words")
    tensors = draw_adapter(method, driver.state_dict(), set(), rng)
    same_set("saved keys where no module is named", tensors, [f"{KEY}wte.trainable_tokens_delta"])
    driver.load(tensors)
    close("output where no module is named", driver.forward(inputs),
          formulas.output(method, base, weights, tensors, config, inputs), "float32")


def merged_over(driver, case, method):
    """Where one adapter takes the other's place, merging it undoes the other's merge first."""
    start(driver, case, "float32")
    before = driver.weights()
    driver.add("other", bookkeeping.second_of(case, method))
    drawn = draw_adapter(method, driver.state_dict("other"), set(), rng_of("over"))
    driver.load(drawn, "other")
    driver.merge(["default"])
    driver.merge(["other"])
    want, _ = formulas.adapted(method, case.base, case.tensors("base"), drawn, bookkeeping.second_of(case, method))
    for name, got in driver.weights().items():
        close(f"{name} with one adapter merged, over another that was", got, want[name], "float32")
    driver.unmerge()
    for name, got in driver.weights().items():
        close(f"{name} after unmerging it", got, before[name], "float32")
    driver.unload(True, ["other"])
    for name, got in driver.weights().items():
        close(f"{name}, the adapter that is not active merged for good", got, want[name], "float32")


def with_its_head(driver, case, method):
    """A prompt's own head of the model goes with it, when it is switched to, off, on again, and deleted."""
    base, inputs = case.tensors("base"), case.tensors("input")
    start(driver, case, "float32")
    others = {k: 0.75 * v for k, v in case.tensors("adapter").items()}
    driver.add("other", case.config)
    driver.load(others, "other")
    own, other = (formulas.output(method, case.base, base, tensors, case.config, inputs)
                  for tensors in (case.tensors("adapter"), others))
    close("output of the first prompt, another being there", driver.forward(inputs), own, "float32")
    driver.switch(["other"])
    close("output after switching to the other", driver.forward(inputs), other, "float32")
    driver.switch(["default"])
    close("output after switching back", driver.forward(inputs), own, "float32")
    driver.switch(["other"])
    driver.delete("other")
    close("output after deleting the other, which was active", driver.forward(inputs), own, "float32")


ARROWS: dict[str, dict] = {"few": {"top_k": 2, "router_temperature": 0.7}, "one": {"top_k": 1},
                           "all": {"top_k": 3, "router_temperature": 2.0},
                           "general": {"top_k": 2, "router_temperature": 1.5, "use_gks": True},
                           "added": {"top_k": 2}, "added-general": {"top_k": 2, "use_gks": True}}


def arrow(driver, case, method, options, added=False):
    """Arrow between saved adapters, each of which stretches one direction most; `added`: the last of them joins when
    the others have run."""
    base, inputs, rng = case.tensors("base"), case.tensors("input"), rng_of("arrow")
    driver.build(case.base, base, case.config, "float32", case=case.id)
    shapes = {k: v.shape for k, v in sorted(driver.state_dict().items())}
    made: dict[str, list] = {"task": [], "general": []}
    options = {"top_k": 3, "router_temperature": 1.0, "use_gks": False, "rng_seed": 3, **options}
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, list] = {kind: [] for kind in made}
        for kind, count in (("task", 3), ("general", 2)):
            for i in range(count):
                size = 1 if kind == "task" else 0.02
                tensors = {k: size * rng.normal(size=s) * (np.geomspace(1, 1e-3, min(s)) if "lora_B" in k else 1)
                           for k, s in shapes.items()}
                driver.build(case.base, base, case.config, "float32", case=case.id)
                driver.load({k: v.astype(np.float32) for k, v in tensors.items()})
                driver.save(str(Path(folder, f"{kind}-{i}")))
                made[kind].append(tensors)
                paths[kind].append(str(Path(folder, f"{kind}-{i}")))
        count = len(paths["task"]) - added
        general = paths["general"] if options["use_gks"] else []
        driver.restore_routed(paths["task"][:count], general, case.base, base, options)

        def now(what, experts):
            want = formulas.output(method, case.base, base, {}, {}, inputs,
                                   route=routing.route(experts, made["general"], case.config, options))
            close(f"output of a router, {options}{what}", driver.forward(inputs), want, "float32")

        now("", made["task"][:count])
        if added:
            driver.load_adapter(paths["task"][-1], f"task_{count}")
            now(", when another expert was added", made["task"])


def arrow_refused(driver, case, method):
    """A router's adapters have the same layers and the same rank."""
    base, last = case.tensors("base"), case.targets[-1]
    with tempfile.TemporaryDirectory() as folder:
        others: dict = {"plain": {}, "rank": {"r": case.config["r"] + 1}, "layers": {"target_modules": [last]}}
        for name, more in others.items():
            driver.build(case.base, base, {**case.config, **more}, "float32", case=f"{method.name}/routed")
            driver.save(str(Path(folder, name)))
        for name in ("rank", "layers"):
            paths = [str(Path(folder, each)) for each in ("plain", name)]
            refuse(f"a router of adapters of other {name}", partial(
                driver.restore_routed, paths, [], case.base, base, {"top_k": 2, "router_temperature": 1.0}))


OWN_TENSORS = ("ln_tuning", "randlora")  # the base model's, or some that all adapters share
TELL_OTHERWISE = ("ln_tuning", "osf", "tinylora", "unilora", "vblora")  # every layer holds what all layers share


def of(method) -> dict:
    """Function -> whether it can be asked of a method."""
    targets = method.rows[0].config.get("target_modules")
    several = bool(method.formula or method.run) and isinstance(targets, list) and len(targets) > 1 \
        and not method.laws.single and not method.laws.second
    plain = several and method.tensors.gauges is None and method.name not in OWN_TENSORS
    mixes = plain and method.laws.mixed_batch and not method.laws.whole_batch
    return {mixed_batches_of_many: mixes, mixed_batches_refused: mixes, mixed_batches_refused_unchanged: mixes,
            merged_by_name: plain and method.merges,
            saved_inactive: not method.laws.single and not method.laws.second and method.tensors.gauges is None,
            stacked: bool(method.formula) and method.laws.stacks and method.merges and not method.laws.single
            and not method.laws.second and method.tensors.gauges is None,
            second_untrained: not method.laws.single and not method.prompt and method.name != "adaption_prompt",
            saved_while_off: not method.laws.single and not method.laws.second and method.tensors.gauges is None,
            switched_while_off: not method.laws.single and not method.laws.second and method.tensors.gauges is None,
            status: several and method.name not in TELL_OTHERWISE}
