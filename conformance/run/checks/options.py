"""What options do that no golden can hold: what is not saved, defaults, KaSA, terms of a loss."""

from __future__ import annotations

import tempfile
from functools import partial

import numpy as np

from ...driver import Rejected
from ...reference import formulas, store
from ...reference.bases import BASES
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter, draw_base, draw_inputs, rng_of
from ...reference.method import KEY
from ...reference.methods import lily, lora, methods, monteclora, xlora
from .config import OWN
from .goldens import load_drawn, same_set, start
from .reject import refuse


def unsaved(driver, case, method):
    """Tensors that a seed determines need not be in a checkpoint, and the adapter is the same without them."""
    field, slots = method.tensors.unsaved
    base, weights, inputs, rng = case.base, case.tensors("base"), case.tensors("input"), rng_of(f"{case.id} unsaved")
    whole, small = ({**case.config, field: on} for on in (True, False))
    driver.build(base, weights, whole, "float32", case=f"{method.name}/unsaved")
    state = driver.state_dict()
    drawn = draw_adapter(method, state, set(), rng)
    tensors = {k: state[k] if method.tensors.is_frozen(k) else v for k, v in drawn.items()}
    out = formulas.output(method, base, weights, tensors, whole, inputs)
    held = {k: v for k, v in tensors.items() if not any(k == s or k.endswith(f".{s}") for s in slots)}
    driver.build(base, weights, small, "float32", case=f"{method.name}/unsaved")
    same_set(f"saved keys with {field} off", driver.state_dict(), held)
    driver.load(held)
    close(f"output with {field} off", driver.forward(inputs), out, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, base, weights, "float32")
    close(f"output after saving and loading with {field} off", driver.forward(inputs), out, "float32")


TASKS = ("num_tasks", "n_tasks")  # inputs name more than the default has
LEFT_OUT = (*OWN, "inference_mode", "peft_version")


def defaults_act(driver, case, method):
    """A field that is not given does what its default does when it is given, alone and with all others."""
    defaults = {k: v for k, v in store.configs()[method.name]["defaults"].items()
                if v is not None and k not in LEFT_OUT and k not in store.configs()[method.name]["required"]}
    pairs = [(case.config, {**defaults, **case.config})]
    for field, value in defaults.items():
        if field in case.config and value != case.config[field]:
            rest = {k: v for k, v in case.config.items() if k != field}
            pairs += [] if field in TASKS else [(rest, {**rest, field: value})]
    for less, more in pairs:
        given = sorted(k for k in more if k not in less)
        try:
            want = begun(driver, case, method, more, None)
        except Rejected:
            continue  # a default for larger layers
        got = begun(driver, case, method, less, want[1])
        same_set(f"saved keys where {given} are not given", got[0], want[0])
        for what, a, b in (("new tensors", got[0], want[0]), ("output", {"": got[2]}, {"": want[2]})):
            for key in b:
                if np.shape(a[key]) != np.shape(b[key]) or not np.allclose(a[key], b[key], 1e-5, 1e-6):
                    raise Failure(f"{what} {key} where {given} are not given are not those with the defaults")


def begun(driver, case, method, config, tensors):
    """What a new adapter holds, tensors that are put in their place, and the output with these."""
    driver.build(case.base, case.tensors("base"), config, "float32", case=f"{method.name}/defaults", seed=3)
    state = driver.state_dict()
    if tensors is None or any(np.shape(tensors[k]) != np.shape(v) for k, v in state.items() if k in tensors):
        frozen = {k for k in state if method.tensors.is_frozen(k)}
        tensors = draw_adapter(method, state, frozen, rng_of(case.id))
    if method.name != "xlora":  # whose classifier no checkpoint holds
        driver.load(tensors)
    return state, tensors, driver.forward(case.tensors("input"))


KASA = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up", "mid"],
        "kasa_config": {"beta": 0.5, "gamma": 0.25}}


def kasa(driver):
    """W' = W_k + s B diag(E) A; W_k, W without its smallest singular values, stays where the adapter is off."""
    base, rng = BASES["mlp"], rng_of("kasa")
    weights, inputs, method = draw_base(base, rng), draw_inputs(base, {}, rng), lora.METHOD
    left = lora.truncated(base, weights, 3, KASA["target_modules"])
    plain = formulas.output(method, base, left, {}, {}, inputs)
    driver.build(base, weights, KASA, "float32", case="lora/kasa")
    state = driver.state_dict()
    shapes = formulas.expected_shapes(method, base, weights, KASA, KASA["target_modules"])
    same_set("saved keys", state, shapes)
    for key, value in state.items():
        if tuple(value.shape) != shapes[key]:
            raise Failure(f"shape of {key}", expected=str(shapes[key]), got=str(value.shape))
        if np.any(value) == key.endswith("lora_B.weight"):
            raise Failure(f"{key} of a new adapter is {'not ' * bool(np.any(value))}zero")
    for key, value in left.items():
        close(f"{key} under a new adapter", driver.weights()[key], value, "float32")
    close("output of a new adapter", driver.forward(inputs), plain, "float32")
    tensors = draw_adapter(method, state, set(), rng)
    out = formulas.output(method, base, left, tensors, KASA, inputs)
    driver.load(tensors)
    close("output", driver.forward(inputs), out, "float32")
    cotangent = rng.normal(size=out.shape)
    want, got = formulas.gradients(method, base, left, tensors, KASA, inputs, cotangent), driver.gradients(inputs,
                                                                                                         cotangent)
    same_set("tensors with a gradient", got, want)
    for key, value in want.items():
        close(f"gradient of {key}", got[key], value, "float32", floor=1)
    loss = lora.kasa_penalty(tensors, KASA)
    close("the further term of the loss", np.array([driver.penalty()]), np.array([loss]), "float32")
    driver.disable(True)
    close("output while disabled", driver.forward(inputs), plain, "float32")
    driver.disable(False)
    driver.merge()
    close("output after merging", driver.forward(inputs), out, "float32")
    driver.unmerge()
    for key, value in left.items():
        close(f"{key} after unmerging", driver.weights()[key], value, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, base, weights, "float32")
    close("output after saving and loading", driver.forward(inputs), out, "float32")


def divergence(driver):
    """MonteCLoRA's further term of the loss, before anything is drawn."""
    method, base, rng = monteclora.METHOD, BASES["mlp"], rng_of("divergence")
    weights, case = draw_base(base, rng), "monteclora/divergence"
    for entropy in (False, True):
        how = {"num_samples": 4, "use_entropy": entropy, "dirichlet_prior": 0.7, "kl_loss_weight": 0.5}
        config = {"peft_type": "LORA", "r": 3, "target_modules": ["up", "mid"], "monteclora_config": how}
        driver.build(base, weights, config, "float32", case=case)
        tensors = load_drawn(driver, method, rng)
        close("the further term of the loss in evaluation", np.array([driver.penalty()]), np.zeros(1), "float32",
              floor=1)
        driver.train(True)
        got = driver.penalty()
        driver.train(False)
        want = np.array([monteclora.penalty(tensors, config)])
        close(f"the further term of the loss, with {how}", np.array([got]), want, "float32")


def trained_adapters(driver, case):
    """X-LoRA trains its adapters only where `use_trainable_adapters` says so."""
    for on in (False, True):
        driver.build(case.base, case.tensors("base"), {**case.config, "use_trainable_adapters": on}, "float32",
                     case="xlora/trained")
        trained = [k for k, v in driver.names().items() if v]
        if any(".lora_" in k for k in trained) != on or not any("classifier" in k for k in trained):
            raise Failure(f"what is trained with use_trainable_adapters {on}", got=str(trained))


def casting(driver, case, method):
    """An input of other bits than the adapter has is brought to them, but while that is declined, which nests."""
    driver.build_with(case.base, case.tensors("base"), case.config, "bfloat16", {}, case=case.id)
    driver.load(case.tensors("adapter"))
    declined = 0
    for change in (0, 1, 1, -1, -1):
        if change:
            driver.casting(change < 0)
        declined += change
        if declined:
            refuse(f"an input in bfloat16, for an adapter in 32 bits, left as it is by {declined},",
                   partial(driver.forward, case.tensors("input")))
        else:
            close("output of an adapter in 32 bits on a base in bfloat16", driver.forward(case.tensors("input")),
                  case.tensors("out")["y"], "bfloat16")


def shared_factors(driver, case, method):
    """Of Lily's layers of one kind all have one B, and as many as `stride_A` says, one after the other, one A."""
    base, rng = BASES["blocks"], rng_of("shared factors")
    weights, inputs = draw_base(base, rng), draw_inputs(base, {}, rng)
    for stride, groups in ((1, [0, 1, 2]), (2, [0, 0, 2]), (3, [0, 0, 0])):
        both = {"peft_type": "LILY", "r": 2, "num_B": 2, "stride_A": stride, "target_modules": ["q_proj", "v_proj"]}
        driver.build(base, weights, both, "float32", case=f"{method.name}/shared")
        driver.step(inputs, rng.normal(size=(3, 4)), 0.1)
        B = [driver.state_dict()[f"{KEY}model.layers.0.{name}.{lily.B}"] for name in both["target_modules"]]
        if np.array_equal(*B):
            raise Failure("layers of two kinds have one B, though their shapes are all that they share")
        config = {**both, "target_modules": ["q_proj"]}
        driver.build(base, weights, config, "float32", case=f"{method.name}/shared")
        keys = [[f"{KEY}model.layers.{i}.q_proj.{slot}" for i in range(3)] for slot in (lily.A, lily.B)]
        tensors = draw_adapter(method, driver.state_dict(), set(), rng)
        tensors |= {key: tensors[keys[0][group]] for key, group in zip(keys[0], groups)}
        tensors |= dict.fromkeys(keys[1], tensors[keys[1][0]])
        driver.load(tensors)
        close(f"output of layers that share A, {stride} by {stride}", driver.forward(inputs),
              formulas.output(method, base, weights, tensors, config, inputs), "float32")
        driver.step(inputs, rng.normal(size=(3, 4)), 0.1)
        got = driver.state_dict()
        for key, own in ((k, [v for v in range(3) if groups[v] == groups[i]]) for i, k in enumerate(keys[0])):
            alike = [i for i in range(3) if np.array_equal(got[keys[0][i]], got[key])]
            if alike != own:
                raise Failure(f"layers that have one A after a step, with stride_A {stride}", str(own), str(alike))


def decomposed_by_seed(driver, case, method):
    """PSOFT's randomised decomposition, which no checkpoint holds, is that of `random_seed`."""
    base, rng, outputs = BASES["wide"], rng_of("decomposed"), {}
    weights, inputs = draw_base(base, rng), draw_inputs(base, {}, rng)
    for seed, again in ((3, 0), (3, 1), (4, 0)):
        config = {"peft_type": "PSOFT", "r": 8, "target_modules": ["up", "mid"], "psoft_svd": "lowrank",
                  "psoft_svd_lowrank_niter": 0, "random_seed": seed}
        driver.build(base, weights, config, "float32", case=f"{method.name}/decomposed", seed=again)
        driver.load(draw_adapter(method, driver.state_dict(), set(), rng_of("decomposed tensors")))
        outputs[seed, again] = driver.forward(inputs)
    close("output by the same random_seed, another global one", outputs[3, 1], outputs[3, 0], "float32")
    if np.allclose(outputs[4, 0], outputs[3, 0], rtol=1e-3):
        raise Failure("the output does not depend on random_seed, with psoft_svd 'lowrank'")


def auxiliary_loss(driver, case, method):
    """Shadow's small decoder is trained by its own prediction, too: the loss, and how it changes with all tensors."""
    base, weights, rng = case.base, case.tensors("base"), rng_of("auxiliary")
    words = case.tensors("input")["input_ids"]
    inputs = {"input_ids": words, "labels": rng.integers(0, base["vocab"], words.shape)}
    tensors = {k: np.asarray(v, np.float64) for k, v in case.tensors("adapter").items()}
    direction = {k: rng.normal(size=v.shape) for k, v in tensors.items()}
    for weight in (0.0, 0.75):
        config = {**case.config, "task_type": "CAUSAL_LM", "auxiliary_loss_weight": weight}
        driver.build(base, weights, config, "float32", case=f"{method.name}/auxiliary")
        driver.load(tensors)
        loss = partial(formulas.output, method, base, weights, config=config, inputs=inputs)
        close(f"the loss with auxiliary_loss_weight {weight}", driver.forward(inputs), loss(tensors), "float32")
        up, down = (loss({k: v + h * direction[k] for k, v in tensors.items()}) for h in (1e-6, -1e-6))
        found = driver.live_gradients(inputs, np.ones(1))
        slope = sum((np.asarray(found[k], np.float64) * v).sum() for k, v in direction.items())
        close(f"slope of the loss with auxiliary_loss_weight {weight}", np.array([slope]), (up - down) / 2e-6,
              "float32", floor=1)


ROUTINGS: tuple[dict, ...] = (
    {"top_k_lora": 2}, {"global_scaling_weight": 1.5}, {"top_k_lora": None}, {"scaling_pass_value": 0.25},
    {"scaling_pass_value": None}, {"global_scaling_weight": 1.0, "scaling_pass_value": 0.0})


def rerouted(driver, case, method):
    """X-LoRA's way to weigh adapters is changed on the model itself; its log tells of runs."""
    base, inputs = case.tensors("base"), case.tensors("input")
    tensors, config = case.tensors("adapter"), dict(case.config)
    start(driver, case, "float32")
    driver.assign(tensors)
    for change in ROUTINGS:
        driver.set_routing(change)
        config |= change
        if config.get("scaling_pass_value", 0) is None:
            config["scaling_pass_value"] = 1 / len(config["adapters"])
        close(f"output after {change}", driver.forward(inputs),
              formulas.output(method, case.base, base, tensors, config, inputs), "float32")
    for batch, runs in ((inputs, 2), ({k: v[:, :2] for k, v in inputs.items()}, 1)):
        want, _ = xlora.routed(case.base, base, tensors, config, batch)
        close(f"what the log tells of {runs} runs", driver.log_routing(batch, runs), np.stack(runs * [want]), "float32")


def layout(driver, case, method):
    """How a layer's weight is stored is seen from the layer, where fan_in_fan_out says otherwise."""
    for case in store.packs()[method.name].cases:
        if case.agreed and case.id.split("/")[1] in ("linear", "conv1d-hf"):
            config = {**case.config, "fan_in_fan_out": not case.config.get("fan_in_fan_out")}
            driver.build(case.base, case.tensors("base"), config, "float32", case=case.id)
            driver.load(case.tensors("adapter"))
            y = driver.forward(case.tensors("input"))
            close(f"output of {case.id} where fan_in_fan_out is wrong", y, case.tensors("out")["y"], "float32")


def undropped(driver, case, method):
    """In evaluation, no dropout that a config asks for acts, in any case of the method."""
    rates = [f for f, v in store.configs()[method.name]["defaults"].items() if "dropout" in f and isinstance(v, float)]
    for case in store.packs()[method.name].cases:
        config = {**case.config, **dict.fromkeys(rates, 0.5)}
        if case.config.get("target_parameters") or not case.agreed:
            continue  # of parameters an adapter never sees the input
        driver.build(case.base, case.tensors("base"), config, "float32", case=case.id)
        (driver.assign if case.data.get("live") else driver.load)(case.tensors("adapter"))
        close(f"output of {case.id} in evaluation, with dropout", driver.forward(case.tensors("input")),
              case.tensors("out")["y"], "float32")


GAPS = ("conv1d", "conv2d", "conv3d")
WITHOUT_GAPS = ("boft", "hra", "oft")  # they take no convolutions with gaps


def gaps(driver, case, method):
    """On convolutions with other steps, gaps and edges than those of the cases."""
    for kind in GAPS:
        like = next((c for c in store.packs()[method.name].cases if c.id.split("/")[1] == kind and c.merges), None)
        if like is None:
            continue
        base, rng = BASES[f"{kind}-gaps"], rng_of(f"{method.name} {kind} gaps")
        named = [f for f in ("target_modules", "feedforward_modules") if like.config.get(f)]
        config = {**like.config, **{f: ["c1"] for f in named}}
        weights, inputs = draw_base(base, rng), draw_inputs(base, {}, rng)
        driver.build(base, weights, config, "float32", case=f"{method.name}/gaps")
        tensors = load_drawn(driver, method, rng)
        close(f"output of an adapter on {kind} with steps, gaps and edges", driver.forward(inputs),
              formulas.output(method, base, weights, tensors, config, inputs), "float32")


SEEDS = {"frod": "projection_prng_key", "pvera": "projection_prng_key", "randlora": "projection_prng_key",
         "shira": "random_seed", "tinylora": "projection_seed", "unilora": "proj_seed", "vera": "projection_prng_key"}


def another_seed(driver, case, method):
    """What a seed determines, and a checkpoint holds, is the checkpoint's, whatever the seed of the config that it is
    loaded into."""
    key = SEEDS[method.name]
    for case in store.packs()[method.name].cases:
        if case.agreed:
            config = {**case.config, key: case.config.get(key, 0) + 11}
            driver.build(case.base, case.tensors("base"), config, "float32", case=case.id)
            driver.load(case.tensors("adapter"))
            close(f"output of {case.id} in a model made with another {key}", driver.forward(case.tensors("input")),
                  case.tensors("out")["y"], "float32")


def tasks_again(driver, case, method):
    """A run does not go on with the tasks of the run before."""
    start(driver, case, "float32")
    inputs = case.tensors("input")
    for _ in range(2):
        for shift in (1, 0):
            given = {**inputs, "task_ids": (inputs["task_ids"] + shift) % case.config["n_tasks"]}
            want = formulas.output(method, case.base, case.tensors("base"), case.tensors("adapter"), case.config, given)
            close("output for other tasks than in the run before", driver.forward(given), want, "float32")


UNPADDED: dict[str, tuple[dict, str, int]] = {  # config, a tensor of a row or column for each word, and which of these
    "lora": ({"target_modules": ["emb"]}, "emb.lora_embedding_A", 1),
    "dora": ({"target_modules": ["emb"]}, "emb.lora_embedding_A", 1),
    "trainable_tokens": ({"target_modules": ["emb"], "token_indices": [0, 3]}, "emb.trainable_tokens_delta", 0)}


def unpadded(driver, case, method):
    """The word that pads a text is not trained, though others are: its embedding has no gradient."""
    base, rng = BASES["embedding-padded"], rng_of("unpadded")
    weights, inputs = draw_base(base, rng), {"x": np.array([[0, 3, 1, 0, 5], [2, 3, 0, 7, 3]])}
    changes, slot, axis = UNPADDED[method.name]
    config = {**case.config, **changes}
    driver.build(base, weights, config, "float32", case=f"{method.name}/unpadded")
    tensors = draw_adapter(method, driver.state_dict(), set(), rng)
    driver.load(tensors)
    cotangent = rng.normal(size=(2, 5, 4))
    got = driver.gradients(inputs, cotangent)[KEY + slot]
    want = formulas.gradients(method, base, weights, tensors, config, inputs, cotangent)[KEY + slot]
    got, want = (np.moveaxis(a, axis, 0) for a in (got, want))
    want[0] = 0
    close(f"gradient of {slot}, the first word being what pads", got, want, "float32", floor=1)


PATTERNS: dict[str, float] = {"rank_pattern": 2, "alpha_pattern": 7, "lambda_pattern": 3.5}
EXPRESSIONS = ("lora", "dora", "bdlora", "velora", "monteclora", "delora", "loha", "lokr")  # others take other keys


def patterns(driver, case, method, fields):
    """A key of a pattern is a regular expression for the end of a layer's path, from a dot on."""
    for field in fields:
        want, out = None, None
        for key, there in (("mid", True), ("m.d", True), ("id", False), ("mi", False)):
            config = {**case.config, field: {key: PATTERNS[field]}}
            driver.build(case.base, case.tensors("base"), config, "float32", case=f"{method.name}/patterns")
            state = driver.state_dict()
            got = {k: list(np.shape(v)) if np.size(v) > 1 else float(np.ravel(v)[0]) for k, v in state.items()}
            if want is None:
                want, tensors = got, draw_adapter(method, state, {k for k in state if method.tensors.is_frozen(k)},
                                                  rng_of(field))
            if there and got != want:
                wrong = [k for k in want if got.get(k) != want[k]]
                raise Failure(f"{field} with the key {key!r}, a new adapter's {', '.join(wrong)}",
                              expected=str([want[k] for k in wrong]), got=str([got.get(k) for k in wrong]))
            if there:
                driver.load(tensors)
                if out is None:
                    out = formulas.output(method, case.base, case.tensors("base"), tensors, config,
                                          case.tensors("input"))
                close(f"output with {field} by the key {key!r}", driver.forward(case.tensors("input")), out, "float32")
            elif field != "alpha_pattern" and got == want:
                raise Failure(f"{field} by the key {key!r}, which is no layer's, has an effect")


def frozen_factor(driver, case, method):
    """MiCA trains A alone, whatever is switched on and off."""
    driver.build(case.base, case.tensors("base"), {**case.config, "init_lora_weights": "mica"}, "float32",
                 case=f"{method.name}/mica")
    for what, change in (("of a new adapter", lambda: None),
                         ("after switching to it", lambda: driver.switch(["default"])),
                         ("when it was off and is on again", lambda: (driver.disable(True), driver.disable(False)))):
        change()
        names = driver.names()
        same_set(f"what MiCA trains {what}", [k for k, v in names.items() if v], [k for k in names if ".lora_A." in k])


def everything(first_case):
    known = methods()
    for m in known.values():
        case = first_case(m)
        if m.tensors.unsaved:
            yield m, "unsaved", partial(unsaved, case=case, method=m)
        fields = [f for f in PATTERNS if f in store.configs().get(m.name, {}).get("defaults", {})]
        if fields and m.name in EXPRESSIONS:
            yield m, "patterns", partial(patterns, case=case, method=m, fields=fields)
        if any("dropout" in f for f in store.configs()[m.name]["defaults"]) and m.tensors.gauges is None and (
                m.name != "xlora"):  # whose dropout is a layer of its own
            yield m, "undropped", partial(undropped, case=case, method=m)
        if m.formula and m.name not in WITHOUT_GAPS and any(
                c.id.split("/")[1] in GAPS for c in store.packs()[m.name].cases):
            yield m, "gaps", partial(gaps, case=case, method=m)
        if "fan_in_fan_out" in store.configs()[m.name]["defaults"] and m.tensors.gauges is None:
            yield m, "layout", partial(layout, case=case, method=m)
        if not m.live(case.config):
            yield m, "defaults", partial(defaults_act, case=case, method=m)
    for name in UNPADDED:
        yield known[name], "unpadded", partial(unpadded, case=first_case(known[name]), method=known[name])
    for name in SEEDS:
        yield known[name], "another-seed", partial(another_seed, case=first_case(known[name]), method=known[name])
    yield known["poly"], "tasks-again", partial(tasks_again, case=first_case(known["poly"]), method=known["poly"])
    yield known["lora"], "kasa", kasa
    yield known["lora"], "frozen-factor", partial(frozen_factor, case=first_case(known["lora"]), method=known["lora"])
    yield known["lora"], "casting", partial(casting, case=first_case(known["lora"]), method=known["lora"])
    yield known["monteclora"], "divergence", divergence
    yield known["psoft"], "decomposed-by-seed", partial(
        decomposed_by_seed, case=first_case(known["psoft"]), method=known["psoft"])
    yield known["lily"], "shared-factors", partial(shared_factors, case=first_case(known["lily"]), method=known["lily"])
    yield known["shadow"], "auxiliary-loss", partial(
        auxiliary_loss, case=store.find("shadow/llama/plain"), method=known["shadow"])
    yield known["xlora"], "rerouted", partial(rerouted, case=store.find("xlora/linear/layerwise"),
                                              method=known["xlora"])
    yield known["xlora"], "trained-adapters", partial(trained_adapters, case=first_case(known["xlora"]))
