"""What else is done with adapters: options of loading and merging, their scale, generating text, several methods in
one model, quantised layers; and what `bookkeeping` and `combining` hold. Most of it follows from goldens and formulas
that are there already.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from ...driver import Rejected
from ...reference import formulas, generating, store
from ...reference.bases import BASES
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter, draw_base, draw_inputs, rng_of
from ...reference.laws import fresh_is_identity
from ...reference.methods import methods
from ...reference.numpy_model import LANGUAGE_MODELS, NO_LABEL, run
from . import bookkeeping, options, saving, schedules, several, targets, tied, tools
from .beginnings import begins_beside
from .bookkeeping import for_use, same_output, trained
from .combining import (
    COMBINED,
    COMBINED_TOO,
    OTHER_LAYERS,
    combine,
    combine_ia3,
    combine_ia3_others,
    combine_others,
    combine_refused,
    combine_smaller_first,
    combine_with_saved,
    combined_dtypes,
    dare,
)
from .goldens import load_drawn, other, same_set, start
from .reject import refuse


def is_trainable(driver, case, method):
    """A loaded adapter is trained only where that is asked for; prompts cannot be."""
    start(driver, case, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        load = lambda **options: driver.restore_with(path, case.base, case.tensors("base"), "float32", options)
        load(is_trainable=False)
        same_output(driver, case, "output of an adapter loaded for use")
        if method.formula or method.run or method.name == "cartridge":  # of other prompts that is not agreed upon
            same_set("what is trained of an adapter loaded for use", trained(driver.names()), [])
        if method.prompt:
            refuse("a prompt that is loaded with is_trainable", lambda: load(is_trainable=True))
            return
        load(is_trainable=True)
        same_output(driver, case, "output of an adapter loaded with is_trainable")
        same_set("what is trained with is_trainable", trained(driver.names()), trained(case.parameters))


def low_cpu_mem_usage(driver, case, method):
    """An adapter that is made without memory at first is the same in the end, also in its dtype."""
    start(driver, case, "float32")
    state = driver.state_dict()
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        if method.formula:
            have = []
            for low in (False, True):
                options = {"low_cpu_mem_usage": low, "autocast_adapter_dtype": False}
                driver.restore_with(path, case.base, case.tensors("base"), "bfloat16", options)
                have.append(driver.dtypes())
            want, got = have
            if wrong := {k: v for k, v in got.items() if want.get(k) != v}:
                raise Failure("dtypes of an adapter loaded with low_cpu_mem_usage on a base in bfloat16",
                              expected=str({k: want.get(k) for k in wrong}), got=str(wrong))
        driver.restore_with(path, case.base, case.tensors("base"), "float32", {"low_cpu_mem_usage": True})
    same_output(driver, case, "output of an adapter loaded with low_cpu_mem_usage")
    same_set("saved keys", driver.state_dict(), state)


def autocast(driver, case, method):
    """On a base in 16 bits, what is trained has 32, unless that is declined."""
    base = case.tensors("base")
    kinds = ["bfloat16", *(["float16"] if "float16" in driver.info()["dtypes"] else [])]

    def check(what, options, want, kind):
        have = driver.dtypes()
        wrong = {k: have.get(k, "missing") for k in trained(case.parameters) if have.get(k) != want}
        if wrong:
            raise Failure(f"dtypes of an adapter {what} on a base in {kind}, with {options}", want, str(wrong))

    for kind, keep in ((kind, keep) for kind in kinds for keep in (False, True)):
        options = {"autocast_adapter_dtype": False} if keep else {}
        want = kind if keep or method.name == "ln_tuning" else "float32"  # that copies the base's own layers
        driver.build_with(case.base, base, case.config, kind, options, case=case.id)
        check("put", options, want, kind)
        with tempfile.TemporaryDirectory() as path:
            driver.save(path)
            driver.restore_with(path, case.base, base, kind, options)
        check("loaded", options, want, kind)
        for key, value in driver.state_dict().items():
            if method.tensors.is_whole(key) and value.dtype.kind not in "iu":
                raise Failure(f"{key}, on a base in {kind}, with {options}", "whole numbers", str(value.dtype))


def used_in_16_bits(driver, case, method):
    """Of an adapter that is loaded for use nothing is trained, also where its tensors are cast to 32 bits."""
    start(driver, case, "bfloat16")
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore_with(path, case.base, case.tensors("base"), "bfloat16", {})
    same_set("what is trained of an adapter for use, on a base in bfloat16", trained(driver.names()), [])


def cast_mixed(driver, case, method):
    """What is trained has 32 bits after `cast_mixed_precision_params`, the rest those that are asked for."""
    for kind in (k for k in ("bfloat16", "float16") if k in driver.info()["dtypes"]):
        driver.build_with(case.base, case.tensors("base"), case.config, kind, {"autocast_adapter_dtype": False},
                          case=case.id)
        driver.cast_mixed(kind)
        on = driver.names()
        wrong = {k: v for k, v in driver.dtypes().items() if v != ("float32" if on[k] else kind)}
        if wrong:
            raise Failure(f"dtypes, what is trained being cast to 32 bits and the rest to {kind}", got=str(wrong))


def narrowing(driver, case, method):
    """A layer that has more inputs than outputs: its output, and the gradients of what is trained."""
    base, rng = BASES["mlp-narrowing"], rng_of(f"{method.name} narrowing")
    weights, inputs = draw_base(base, rng), draw_inputs(base, {}, rng)
    driver.build(base, weights, case.config, "float32", case=f"{method.name}/narrowing")
    tensors = load_drawn(driver, method, rng)
    y = formulas.output(method, base, weights, tensors, case.config, inputs)
    close("output of layers that narrow", driver.forward(inputs), y, "float32")
    cotangent = rng.normal(size=y.shape)
    want = formulas.gradients(method, base, weights, tensors, case.config, inputs, cotangent)
    got = driver.gradients(inputs, cotangent)
    same_set("tensors with a gradient, in layers that narrow", got, want)
    for k, v in want.items():
        close(f"gradient of {k}, in layers that narrow", got[k], v, "float32", floor=1)


NOTHING: dict[str, dict] = {"c3a": {"init_weights": True}, "fourierft": {"init_weights": True}}  # not their defaults


def begins_as_base(driver, case, method):
    """In every case of a method whose adapters begin as nothing, a new one changes nothing."""
    for case in store.packs()[method.name].cases:
        y, plain = case.tensors("out")["y"], case.tensors("plain")["y"]
        config = {**case.config, **NOTHING.get(method.name, {})}
        odd = method.name == "hra" and config["r"] % 2  # reflections come in pairs
        drawn = odd or config.get("para") or any(k.startswith("init_") and v is False for k, v in config.items())
        if drawn or case.data["golden"] != "reference" or y.shape != plain.shape:
            continue
        driver.build(case.base, case.tensors("base"), config, "float32", case=case.id, seed=1)
        close(f"output of {case.id} with a new adapter", driver.forward(case.tensors("input")), plain, "float32")
        if not method.laws.single and config.get("bias", "none") == "none":
            driver.add("other", {**config, **method.laws.second})
            driver.switch(["other"])
            close(f"output of {case.id} with a new adapter beside another", driver.forward(case.tensors("input")),
                  plain, "float32")


def begins_orthogonal(driver, case, method):
    """Factors out of one orthogonal matrix, whose product is nothing."""
    plain = case.tensors("plain")["y"]
    for r in (2, 6):
        config = {**case.config, "r": r, "init_lora_weights": "orthogonal"}
        driver.build(case.base, case.tensors("base"), config, "float32", case=case.id, seed=1)
        close(f"output with new orthogonal factors of rank {r}", driver.forward(case.tensors("input")), plain,
              "float32")


def safely_merged(driver, case, method):
    """In every case of a method that merges, merging safely gives what merging gives."""
    for case in store.packs()[method.name].cases:
        if case.merges:
            start(driver, case, "float32")
            driver.safe_merge()
            got, also = driver.weights(), other(case, "paper_merged")
            for name, want in case.tensors("merged").items():
                close(f"{name} of {case.id}, safely merged", got[name], want, "float32", also.get(name))


def taken_off(driver, case, method):
    """In every case, the base model is as it was when its adapter is taken off: its output, its weights and the names
    of its parameters."""
    for case in store.packs()[method.name].cases:
        base = case.tensors("base")
        driver.build(case.base, base, None, "float32", case=case.id)
        names = driver.names()
        start(driver, case, "float32")
        driver.unload(False)
        same_set(f"parameters of {case.id}, taken off", driver.names(), names)
        if not any(formulas.plain_name(k) in base for k in case.keys):
            close(f"output of {case.id}, taken off", driver.forward(case.tensors("input")), case.tensors("plain")["y"],
                  "float32")
            for name, got in driver.weights().items():
                close(f"{name} of {case.id}, taken off", got, base[name], "float32")


def merged_for_good(driver, case, method):
    """In every case of a method that merges: the weights that are left when the adapter is merged and gone."""
    for case in store.packs()[method.name].cases:
        if case.merges:
            start(driver, case, "float32")
            driver.unload(True)
            got, also = driver.weights(), other(case, "paper_merged")
            for name, want in case.tensors("merged").items():
                close(f"{name} of {case.id}, merged for good", got[name], want, "float32", also.get(name))


INVOKED = [5, 9]  # and where it stands in a text: once, twice, at its end, overlapping what looks like it, nowhere
TEXTS = [[1, 5, 9, 4, 2, 3], [5, 9, 1, 5, 9, 2], [1, 2, 3, 4, 5, 9], [5, 5, 9, 5, 4, 9], [1, 9, 5, 3, 2, 4]]


def invocation(driver, case, method):
    """An aLoRA begins where it was invoked last, in each text for itself; where it was not, it does nothing."""
    config = {**case.config, "alora_invocation_tokens": INVOKED}
    inputs = {"input_ids": np.array(TEXTS), "attention_mask": np.ones_like(TEXTS)}
    want = formulas.output(method, case.base, case.tensors("base"), case.tensors("adapter"), config, inputs)
    driver.build(case.base, case.tensors("base"), config, "float32", case=f"{method.name}/invocation")
    driver.load(case.tensors("adapter"))
    close("output for texts with and without an invocation", driver.forward(inputs), want, "float32")


def mixes(method) -> bool:
    return method.laws.mixed_batch and not method.laws.whole_batch and not method.prompt


FORMS: dict[str, dict] = {"road": {"variant": "road_2"}}  # what else another adapter can be than of another strength


def mixed_batches_saved(driver, case, method):
    """`mixed_batches` where adapters hold whole modules."""
    mixed_batches(driver, case, method, saved=True)


def mixed_batches(driver, case, method, saved=False):
    """In every case of the method, each sample with its own adapter or none, while yet another one is active."""
    for case in store.packs()[method.name].cases:
        y, plain = case.tensors("out")["y"], case.tensors("plain")["y"]
        c = case.config
        if not case.agreed or y.shape != plain.shape or len(y) < 2 \
                or bool(c.get("modules_to_save")) != saved or c.get("bias", "none") != "none" \
                or c.get("target_parameters") or case.data["base_name"] == "buffer":  # no such modules, says PEFT
            continue
        start(driver, case, "float32")
        driver.add("other", bookkeeping.second_of(case, method, **FORMS.get(method.name, {})))
        if saved and method.name not in FORMS:
            driver.load({k: v if method.tensors.is_frozen(k) else 0.75 * v
                         for k, v in case.tensors("adapter").items()}, "other")
        driver.switch(["other"])
        names = [None if i % 2 else "default" for i in range(len(y))]
        want = np.stack([plain[i] if name is None else y[i] for i, name in enumerate(names)])
        close(f"output of {case.id} for {names}, another being active", driver.forward(case.tensors("input"), names),
              want, "float32")


def sixteen_bits(driver, case, method):
    """An adapter in 32 bits on a base in bfloat16: the output is as exact as the base is, and of its dtype; merging
    leaves the weights in it."""
    for case in store.packs()[method.name].cases:
        if "bfloat16" not in case.dtypes or not case.agreed:
            continue
        driver.build_with(case.base, case.tensors("base"), case.config, "bfloat16", {}, case=case.id)
        driver.load(case.tensors("adapter"))
        for merged in (False, True)[:1 + case.merges]:
            if merged:
                driver.merge()
            y, what = driver.forward(case.tensors("input")), f"output of {case.id}{', merged,' * merged} in bfloat16"
            close(what, y, case.tensors("out")["y"], "bfloat16")
            if not in_bfloat16(y):
                raise Failure(what, expected="numbers of bfloat16", got="others, of more bits")
            wide = {k: v for k, v in driver.dtypes().items() if v != "bfloat16" and "default" not in k.split(".")}
            if merged and wide:
                raise Failure(f"dtypes of the base's parameters in {case.id}, merged", "bfloat16", str(wide))


def in_bfloat16(a) -> bool:
    """Has every number the bits of bfloat16 alone?"""
    return not (np.asarray(a, np.float32).view(np.uint32) & 0xFFFF).any()


def safe_merge(driver, case, method):
    """It merges as ever what is finite, and refuses what is not, the weights being as they were."""
    start(driver, case, "float32")
    driver.safe_merge()
    for k, want in case.tensors("merged").items():
        close(f"safely merged {k}", driver.weights()[k], want, "float32")
    start(driver, case, "float32")
    before, state = driver.weights(), driver.state_dict()
    live = {k: np.full(shape, np.nan, np.float32) for k, shape in live_shapes(case, state).items()}
    if not live:
        return
    driver.assign(live)
    refused_unchanged(driver, before, "an adapter that is not a number")
    if method.name in OVERFLOWING:
        driver.assign({k: np.full_like(v, HUGE) for k, v in live.items()})
        refused_unchanged(driver, before, "an adapter whose product is infinite")


def refused_unchanged(driver, before, what):
    refuse(f"{what}, merged safely,", driver.safe_merge)
    changed = [k for k, v in driver.weights().items() if not np.array_equal(v, before[k])]
    if changed:
        raise Failure(f"{what} was refused, but {changed} changed")


HUGE = 1e30  # whose square is infinite in float32, and no difference of infinite numbers is taken
OVERFLOWING = ("lora", "loha", "lokr", "adalora", "vera", "randlora")


def live_shapes(case, state) -> dict:
    """Live name -> shape of what is trained, for adapters whose live names are the saved keys with a name in them."""
    saved = {k: v.shape for k, v in state.items()}
    return {k: saved[key] for k in trained(case.parameters) if (key := k.replace(".default", "")) in saved}


def adds_as_much(driver, case, before, what, factor):
    """Merging changes the weights by `factor` times what it does in the case."""
    driver.merge()
    after = driver.weights()
    driver.unmerge()
    for k, want in case.tensors("merged").items():
        close(f"change of {k} {what}", after[k], before[k] + factor * (want - before[k]), "float32")


def set_scale(driver, case, method):
    """Every way to change an adapter's strength changes what it adds by that factor."""
    start(driver, case, "float32")
    adds = partial(adds_as_much, driver, case, driver.weights())
    driver.set_scale("default", 2.0)
    adds("at scale 2", 2)
    driver.scale(1.5)
    adds("at scale 2 times 1.5", 3)
    driver.unscale(6.0)
    adds("at scale 3 divided by 6", 0.5)
    driver.set_scale("default", 1.25)
    adds("at scale 1.25, whatever it was", 1.25)
    driver.unscale()
    adds("when its scale is set back", 1)
    driver.add("other", {**case.config, **method.laws.second})
    driver.set_scale("other", 3.0)
    adds("when another adapter is scaled", 1)


def set_scale_alone(driver, case, method):
    """`set_scale`, where there is no other way to change an adapter's strength."""
    start(driver, case, "float32")
    adds = partial(adds_as_much, driver, case, driver.weights())
    driver.add("other", {**case.config, **method.laws.second})
    driver.set_scale("default", 2.0)
    adds("at scale 2", 2)
    driver.set_scale("other", 3.0)
    driver.set_scale("default", 1.25)
    adds("at scale 1.25, whatever it was", 1.25)


def rescale(driver, case, method):
    """A multiplier for a while: the scale that was there before is there afterwards."""
    start(driver, case, "float32")
    adds = partial(adds_as_much, driver, case, driver.weights())
    driver.set_scale("default", 2.0)
    driver.rescale(0.25)
    adds("at scale 2, rescaled to a quarter", 0.5)
    driver.rescale(None)
    adds("when it is rescaled no longer", 2)
    driver.rescale(3.0)
    driver.rescale(None, True)
    adds("when it is rescaled no longer, after an error", 2)


NEW_TOKENS = 4


def texts_of(case) -> dict:
    """The input to go on from; the second text is padded."""
    inputs = {k: v for k, v in case.tensors("input").items() if "decoder" not in k}
    padded = {"attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    return {**padded, **inputs} if case.id == FROM_PADDED else inputs


def likeliest(case, method, adapter) -> tuple[np.ndarray, float]:
    """(the ids of the input and the likeliest next ones, how much likelier than the second they are at least)."""
    prompt = method.prompt and generating.encoder_alone(method.prompt.formula)
    output = partial(formulas.output, method, case.base, case.tensors("base"), adapter, case.config, prompt=prompt)
    return generating.likeliest(output, case.base, texts_of(case), NEW_TOKENS)


STRONGER = {"lora/encoder-decoder/plain": 6.0, "prompt_tuning/encoder-decoder/plain": -8.0,
            "poly/causal-lm/tasks": 12.0, "poly/encoder-decoder/plain": 8.0}  # where its own tensors change no word


def telling(case) -> dict:
    """The case's tensors, or larger ones, with which a text goes on otherwise than without adapter."""
    return {k: STRONGER.get(case.id, 1) * np.asarray(v) for k, v in case.tensors("adapter").items()}


def generate(driver, case, method, off=True):
    """Word by word, the prompt being there from the first to the last; without the adapter, if that is asked for, what
    the base model says, whatever was generated before."""
    def same(what, want):
        got = np.asarray(driver.generate(texts_of(case), NEW_TOKENS))
        if not np.array_equal(got, want):
            raise Failure(what, expected=str(want.tolist()), got=str(got.tolist()))

    want, _ = likeliest(case, method, telling(case))
    plain, _ = likeliest(case, methods()["lora"], {})
    start(driver, case, "float32")
    if case.id in STRONGER:
        driver.load(telling(case))
    same("generated ids", want)
    if not off:
        return
    driver.disable(True)
    same("ids generated while the adapter is off", plain)
    driver.disable(False)
    same("ids generated when it is on again", want)


def mixed(driver, first, second):
    """Adapters of two methods in one model: each alone, both, none, and merged.

    The second one is put around the first.
    """
    base, inputs = first.tensors("base"), first.tensors("input")
    one, two, output = several.of_two(first, second)

    def now(what, *adapters):
        close(f"output of {what}", driver.forward(inputs), output(*adapters), "float32")

    driver.build_with(first.base, base, first.config, "float32", {"mixed": True}, case=first.id)
    driver.load(first.tensors("adapter"))
    driver.add("other", second.config)
    driver.load(second.tensors("adapter"), "other")
    now("the first adapter", one)
    driver.switch(["other"])
    now("the second adapter", two)
    driver.switch(["default", "other"])
    now("both adapters", one, two)
    driver.disable(True)
    now("no adapter")
    driver.disable(False)
    driver.unload(merge=True)
    now("both adapters, merged", one, two)


def converted(driver, base, method, config, what):
    """An adapter that changed the base weights when it was made, trained and saved as one for the unchanged ones."""
    rng = rng_of(f"converted {what}")
    weights, inputs = draw_base(base, rng), draw_inputs(base, {}, rng)
    build = lambda: driver.build(base, weights, config, "float32", case=f"{method.name}/converted/{what}")
    build()
    close("output of a new adapter", driver.forward(inputs), run(base, weights, inputs), "float32")
    with tempfile.TemporaryDirectory() as path:
        begun, saved = str(Path(path, "begun")), str(Path(path, "saved"))
        driver.save(begun)
        driver.load(draw_adapter(method, driver.state_dict(), set(), rng))
        out = driver.forward(inputs)
        driver.save_converted(saved, begun)
        close("output of the adapter itself, after it was saved as another", driver.forward(inputs), out, "float32")
        held = driver.config_of("default")
        if (held["r"], held["lora_alpha"]) != (config["r"], config["lora_alpha"]):
            raise Failure("r and lora_alpha of the adapter itself, after it was saved as another",
                          expected=str((config["r"], config["lora_alpha"])), got=str((held["r"], held["lora_alpha"])))
        driver.add("begun", {**config, "init_lora_weights": True})  # nothing of that name is left
        driver.restore(saved, base, weights, "float32")
    close("output of the converted adapter on the unchanged base", driver.forward(inputs), out, "float32")


def as_lora(driver, case, method):
    """An adapter saved as one of LoRA, of as many ranks as it has, does the same."""
    start(driver, case, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save_as_lora(path, 1.0)
        driver.restore(path, case.base, case.tensors("base"), "float32")
    same_output(driver, case, "output of an adapter saved as one of LoRA")


def truncated(delta, rank):
    """The matrix of that rank, or of the fewest ranks with that share of the squares, which is nearest."""
    U, S, V = np.linalg.svd(delta, full_matrices=False)
    if isinstance(rank, float):
        rank = 1 + int(np.searchsorted(np.cumsum(S**2), rank * (S**2).sum()))
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def as_lora_by_rank(driver, case, method):
    """An adapter saved as one of LoRA, of fewer ranks than it has: the nearest matrix, layer by layer. It need not be
    the active one."""
    base, merged = case.tensors("base"), case.tensors("merged")
    for rank in (2, 0.7):
        driver.build(case.base, base, bookkeeping.second_of(case, method), "float32", case=case.id)
        driver.add("other", case.config)
        driver.load(case.tensors("adapter"), "other")
        with tempfile.TemporaryDirectory() as path:
            driver.save_as_lora(path, rank, "other")
            driver.restore(path, case.base, base, "float32")
        driver.merge()
        got = driver.weights()
        for name, value in merged.items():
            if name.endswith("weight"):
                close(f"{name} with an adapter saved as one of LoRA of {rank}, merged", got[name],
                      base[name] + truncated(value - base[name], rank), "float32")


def as_lora_of_all(driver, case, method):
    """In every case of linear layers; what is saved whole goes with it, but for buffers, which PEFT cannot convert."""
    for case in store.packs()[method.name].cases:
        c = case.config
        if case.id.split("/")[1] == "linear" and case.agreed and case.merges and case.data["base_name"] != "buffer" \
                and c.get("bias", "none") == "none" and not c.get("lora_bias"):
            as_lora(driver, case, method)


def as_lora_or_not(driver, case, method):
    """An adapter on Conv1D that is saved as one of LoRA does the same, where that is not refused."""
    for case in store.packs()[method.name].cases:
        if case.id.split("/")[1] == "conv1d-hf" and case.merges:
            with contextlib.suppress(Rejected):
                as_lora(driver, case, method)


def asked_otherwise(driver, case, method):
    """In every case of a language model: with positions that are the usual ones, with a mask that hides nothing, with
    words that are embedded already; and labels of which some count for nothing."""
    for case in store.packs()[method.name].cases:
        if case.base.get("model") not in LANGUAGE_MODELS or not case.agreed:
            continue
        inputs, base = case.tensors("input"), case.tensors("base")
        ids, emb = inputs["input_ids"], next(v for k, v in base.items() if k.endswith("embed_tokens.weight"))
        start(driver, case, "float32")
        ways = {"embedded words": {"inputs_embeds": emb[ids], "input_ids": None}}
        if case.base["model"] != "encoder_decoder":
            ways["positions"] = {"position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape)}
        if "attention_mask" not in inputs:
            ways["a mask that hides nothing"] = {"attention_mask": np.ones_like(ids)}
        for what, more in ways.items():
            given = {k: v for k, v in {**inputs, **more}.items() if v is not None}
            close(f"output of {case.id} for {what}", driver.forward(given), case.tensors("out")["y"], "float32")
        if "labels" in inputs and inputs["labels"].ndim > 1 and not (method.prompt and method.prompt.loss):
            labels = inputs["labels"].copy()
            labels[:, -1], labels[0, 0] = NO_LABEL, NO_LABEL
            given = {**inputs, "labels": labels}
            if case.data.get("live") or ("decoder_input_ids" not in inputs and case.base["model"] == "encoder_decoder"):
                continue
            want = formulas.output(method, case.base, base, case.tensors("adapter"), case.config, given)
            close(f"loss of {case.id} where some labels count for nothing", driver.forward(given), want, "float32")


def second_bias(driver, case, method):
    """Biases of the base model can be trained by one adapter alone: another one is refused, and all is as before."""
    start(driver, case, "float32")
    names = driver.names()
    refuse("another adapter that trains the base model's biases",
           lambda: driver.add("other", {**case.config, **method.laws.second}))
    same_set("live parameter names after it was refused", driver.names(), names)
    same_output(driver, case, "output after it was refused")
    driver.add("other", {**case.config, **method.laws.second, "bias": "none"})
    same_output(driver, case, "output after adding one that trains none")


AS_LORA = ("c3a", "delora", "dora", "fourierft", "gralora", "loha", "lokr", "lora", "miss", "monteclora", "psoft",
           "randlora", "tinylora", "unilora", "vblora", "velora", "vera", "waveft")
ALONE = ("fourierft",)  # in its other cases rounding shows
BY_RANK = ("lora", "loha", "lokr", "vera", "fourierft", "gralora", "delora")
MIXED_IN_TEXT = ("lora/causal-lm/masked",)
STARTS = 8


def vocabulary(driver, case, method):
    """A prompt that begins as words: each row is one of the embedding's, and any may be."""
    base = case.tensors("base")
    words = next(v for k, v in base.items() if "emb" in k and len(v) == case.base["vocab"])
    config, seen = {**case.config, "prompt_tuning_init": "SAMPLE_VOCAB"}, set()
    for seed in range(STARTS):
        driver.build(case.base, base, config, "float32", case=f"{method.name}/vocabulary", seed=seed)
        (rows,) = driver.state_dict().values()
        off = np.abs(np.asarray(rows)[:, None] - words[None]).max(-1)
        if off.min(1).max() > 1e-6:
            raise Failure("a prompt that begins as words of the vocabulary has rows that are none of the embedding's")
        seen |= set(off.argmin(1).tolist())
    if len(seen) <= 0.7 * len(words):
        raise Failure(f"of {len(words)} words, prompts begin as some of {len(seen)} alone, in {STARTS} starts",
                      got=str(sorted(seen)))


def small_file(driver, case, method):
    """A checkpoint that holds of each choice only what is chosen, out of more than a byte can count."""
    base, inputs = case.tensors("base"), case.tensors("input")
    whole = {**case.config, "num_vectors": 300}
    driver.build(case.base, base, whole, "float32", case=f"{method.name}/small")
    rng = rng_of("small")
    tensors = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in sorted(driver.state_dict().items())}
    small = {**whole, "save_only_topk_weights": True}
    held = method.tensors.compact(tensors, small)
    out = formulas.output(method, case.base, base, tensors, whole, inputs)
    driver.build(case.base, base, small, "float32", case=f"{method.name}/small")
    driver.load({k: v if v.dtype.kind == "i" else v.astype(np.float32) for k, v in held.items()})
    close("output of an adapter from such a checkpoint", driver.forward(inputs), out, "float32")
    got = driver.state_dict()
    same_set("keys of such a checkpoint", got, held)
    for key, want in held.items():
        close(f"{key} of such a checkpoint", np.asarray(got[key], np.float64), want, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, case.base, base, "float32")
    close("output after saving and loading it", driver.forward(inputs), out, "float32")


def quantised(driver, case, method, kind):
    """What an adapter does to the layer as it is stored in 4 bits, which the output for a unit matrix tells."""
    rng = rng_of(f"{case.id} {kind}")
    base = BASES["one-layer"]
    weights = draw_base(base, rng)
    config = {**case.config, "target_modules": ["up"]}
    driver.build_quantised(base, weights, None, kind, case=f"{method.name}/{kind}")
    bias = driver.forward({"x": np.zeros((1, 64))})
    held = {"up.weight": (driver.forward({"x": np.eye(64)}) - bias).T, "up.bias": bias[0]}
    driver.build_quantised(base, weights, config, kind, case=f"{method.name}/{kind}")
    tensors = load_drawn(driver, method, rng)
    inputs = {"x": rng.normal(size=(3, 64))}
    close(f"output of an adapter on a layer in {kind}", driver.forward(inputs),
          formulas.output(method, base, held, tensors, config, inputs), "float32")


MIXED = (("lora/linear/plain", "loha/linear/plain"), ("loha/linear/plain", "lokr/linear/plain"),
         ("lokr/linear/plain", "adalora/linear/plain"), ("adalora/linear/plain", "oft/linear/adjusted-block"),
         ("lora/linear/plain", "oft/linear/adjusted-block"), ("oft/linear/adjusted-block", "lora/linear/plain"),
         ("shira/linear/plain", "lora/linear/plain"))
PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning", "cartridge", "cpt", "multitask_prompt_tuning", "lora")
FULL = ("all-dtypes", "apart-with", "arrow", "as-lora-", "asked-otherwise", "base-state", "begins-beside", "card",
        "cast", "combine-dtypes", "combine-others", "combine-patterns", "combine-smaller", "combine-with",
        "conditioned", "converted-p", "defaults", "deleted-whole", "embeddings", "frozen-factor", "gaps", "given-",
        "layout", "life-with", "mixed-batches-refused", "other-file", "patterns", "reused-name", "safely-merged",
        "saved-", "second-", "stacked", "swapped", "switched-while", "taken-off", "targets-", "tied-", "tool-",
        "undropped", "unpadded", "used-")  # LoRA's, not in the core profile
KINDS = ("nf4", "fp4")
QUANTISED = ("lora", "dora", "adalora", "ia3", "vera", "oft", "boft", "randlora", "road", "miss", "vblora", "waveft")
GENERATED = ("lora/causal-lm/masked", "prompt_tuning/causal-lm/masked", "prefix_tuning/causal-lm/masked",
             "prefix_tuning/causal-lm/projection", "p_tuning/causal-lm/lstm", "cartridge/causal-lm/none-frozen",
             "cpt/causal-lm/plain", "multitask_prompt_tuning/causal-lm/from-the-mean", "lora/encoder-decoder/plain",
             "prompt_tuning/encoder-decoder/plain", "poly/causal-lm/tasks",
             "poly/encoder-decoder/plain")
FROM_PADDED = "p_tuning/encoder-decoder/mlp"


CONVERTED: dict[str, dict] = {
    "pissa": {"init_lora_weights": "pissa"}, "olora": {"init_lora_weights": "olora"},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-patterns": {"init_lora_weights": "pissa", "rank_pattern": {"mid": 2}, "alpha_pattern": {"up": 5, "mid": 7}},
    "plain": {}}
SCALED = ("loha", "lokr", "adalora")  # what they add is too small beside the weight for the law of linearity


def of_reference(method) -> bool:
    """Is there a case of the method whose golden is agreed?"""
    return any(case.agreed for case in store.packs()[method.name].cases)


def first_case(method):
    """The case of a method that has a lifecycle, else its first one."""
    cases = store.packs()[method.name].cases
    return next((c for c in cases if c.data.get("trace")), cases[0])


def of_every_method():
    """(method, what, function(driver)) of what is asked of every method that it can concern."""
    for m in methods().values():
        case, layers = first_case(m), bool(m.formula or m.run)
        applies: dict = {is_trainable: True, low_cpu_mem_usage: True,
                   autocast: layers, used_in_16_bits: layers and m.name != "ln_tuning",
                   narrowing: bool(m.formula) and m.tensors.gauges is None and case.data["base_name"] == "mlp",
                   begins_beside: not m.laws.single and set(m.laws.second) <= {"inference_mode"} and any(
                       r["method"] == m.name for r in store.rows("beginnings")),
                   begins_as_base: fresh_is_identity.applies(m) and of_reference(m),
                   merged_for_good: m.merges, safely_merged: m.merges,
                   taken_off: layers and not m.route, mixed_batches: mixes(m),
                   mixed_batches_saved: mixes(m) and any(
                       c.config.get("modules_to_save") for c in store.packs()[m.name].cases),
                   sixteen_bits: layers and m.name != "ln_tuning" and m.tensors.gauges is None and any(
                       "bfloat16" in c.dtypes for c in store.packs()[m.name].cases),
                   safe_merge: m.merges, set_scale: m.merges and (m.laws.scales or m.name in SCALED),
                   rescale: m.merges and m.laws.scales, **bookkeeping.of(m), **several.of(m),
                   **saving.of(m), **tools.of(m)}
        for function, does in applies.items():
            if does:
                yield m, function.__name__.replace("_", "-"), partial(function, case=case, method=m)


def everything():
    """(method, what, function(driver)) of all these checks."""
    yield from of_every_method()
    yield from options.everything(first_case)
    yield from tied.everything()
    yield from tools.everything(first_case)
    known = methods()
    plain = store.find("lora/linear/plain")
    for how in COMBINED:
        yield known["lora"], f"combine-{how}", partial(combine, case=plain, method=known["lora"], how=how)
    rslora = partial(set_scale, case=store.find("lora/linear/rslora"), method=known["lora"])
    yield known["lora"], "set-scale-rslora", rslora
    for name in ("lora", "ia3"):
        yield known[name], "combine-with-saved", partial(
            combine_with_saved, case=first_case(known[name]), method=known[name])
    yield known["lora"], "combine-smaller-first", partial(combine_smaller_first, case=plain, method=known["lora"])
    for kind, how in COMBINED_TOO:
        case = store.find(f"lora/{kind}/plain")
        yield known["lora"], f"combine-{how}-{kind}", partial(combine, case=case, method=known["lora"], how=how)
    yield known["ia3"], "combine", partial(combine_ia3, case=first_case(known["ia3"]), method=known["ia3"])
    yield known["ia3"], "combine-other-layers", partial(
        combine_ia3_others, case=store.find("ia3/linear/feedforward"), method=known["ia3"])
    for how in ("dare_linear", "dare_ties"):
        name = f"combine-{how.replace('_', '-')}"
        yield known["lora"], name, partial(dare, case=plain, method=known["lora"], how=how)
    for what, config in CONVERTED.items():
        yield known["lora"], f"converted-{what}", partial(
            converted, base=BASES["mlp"], method=known["lora"], what=what,
            config={"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["up", "mid"], **config})
    for id, both in (("lora/linear/modules-to-save", False), ("lora/linear/plain", True)):
        name = "for-use-mixed" if both else f"for-use-{id.rpartition('/')[2]}"
        yield known["lora"], name, partial(for_use, case=store.find(id), method=known["lora"], mixed=both)
    for name, what, function, more in saving.of_some():
        yield known[name], what, partial(function, method=known[name], **more)
    for name, function in (("prompt_tuning", vocabulary), ("vblora", small_file), ("adalora", schedules.schedule)):
        what = function.__name__.replace("_", "-")
        yield known[name], what, partial(function, case=first_case(known[name]), method=known[name])
    yield known["adamss"], "subspaces", partial(
        schedules.subspaces, case=store.find("adamss/linear/adaptive"), method=known["adamss"])
    for case in map(store.find, GENERATED):
        method = known[case.pack.data["method"]]
        kind, what = case.id.split("/")[1:]
        what, apart = what if kind == "causal-lm" else kind, method.prompt is not None and kind == "encoder-decoder"
        for end, off in (("", not apart), *([("-off", True)] if apart else [])):
            yield method, f"generate-{what}{end}", partial(generate, case=case, method=method, off=off)
    p_tuning = store.find(FROM_PADDED)
    for what, off in (("generate-from-padded", False), ("generate-from-padded-off", True)):
        yield known["p_tuning"], what, partial(generate, case=p_tuning, method=known["p_tuning"], off=off)
    for name in AS_LORA:
        for function in (as_lora, *([as_lora_of_all] if name not in ALONE and of_reference(known[name]) else []),
                         *([as_lora_by_rank] if name in BY_RANK else [])):
            what = function.__name__.replace("_", "-")
            yield known[name], what, partial(function, case=first_case(known[name]), method=known[name])
        if any(c.id.split("/")[1] == "conv1d-hf" for c in store.packs()[name].cases):
            yield known[name], "as-lora-or-not", partial(
                as_lora_or_not, case=first_case(known[name]), method=known[name])
    for name in PROMPTS:
        yield known[name], "asked-otherwise", partial(asked_otherwise, case=first_case(known[name]), method=known[name])
    for id in ("bias-all", "bias-lora-only"):
        yield known["lora"], f"second-{id}", partial(
            second_bias, case=store.find(f"lora/linear/{id}"), method=known["lora"])
    yield known["lora"], "conditioned", targets.conditioned
    for name, method in known.items():
        rows = [r for r in store.rows("targets") if r["method"] == name and targets.first_beside(r)
                and not r.get("refused") and "types" not in r]
        if rows and not method.laws.single:
            yield method, "targets-beside", partial(targets.beside, rows=rows)
    for name, case in (("lora", plain), ("lora", store.find("lora/linear/modules-to-save")),
                       ("ia3", first_case(known["ia3"]))):
        yield known[name], f"cast-mixed-{case.id.rpartition('/')[2]}", partial(
            cast_mixed, case=case, method=known[name])
    yield known["lora"], "combine-dtypes", partial(combined_dtypes, case=plain, method=known["lora"])
    yield known["lora"], "combine-patterns", partial(combine, case=plain, method=known["lora"], how="linear", patterns={
        "alpha_pattern": {"mid": 7.5}})
    yield known["ln_tuning"], "merged-over", partial(
        several.merged_over, case=first_case(known["ln_tuning"]), method=known["ln_tuning"])
    yield known["lora"], "begins-orthogonal", partial(begins_orthogonal, case=plain, method=known["lora"])
    yield known["alora"], "invocation", partial(
        invocation, case=store.find("lora/causal-lm/masked"), method=known["alora"])
    yield known["shira"], "set-scale-alone", partial(
        set_scale_alone, case=first_case(known["shira"]), method=known["shira"])
    for how in OTHER_LAYERS:
        yield known["lora"], f"combine-others-{how}", partial(
            combine_others, case=plain, method=known["lora"], how=how)
    yield known["lora"], "combine-others-regex", partial(
        combine_others, case=plain, method=known["lora"], how="svd", regex=True)
    yield known["lora"], "combine-refused", partial(combine_refused, case=plain, method=known["lora"])
    yield known["trainable_tokens"], "tokens", partial(
        several.tokens, case=first_case(known["trainable_tokens"]), method=known["trainable_tokens"])
    yield known["trainable_tokens"], "embedding-found", partial(
        several.embedding_found, case=first_case(known["trainable_tokens"]), method=known["trainable_tokens"])
    for name in ("prompt_tuning", "prefix_tuning", "multitask_prompt_tuning"):
        yield known[name], "with-its-head", partial(
            several.with_its_head, case=store.find(f"{name}/encoder/sequence"), method=known[name])
    yield known["lora"], "arrow-refused", partial(several.arrow_refused, case=plain, method=known["lora"])
    for what, fields in several.ARROWS.items():
        yield known["lora"], f"arrow-{what}", partial(
            several.arrow, case=plain, method=known["lora"], options=fields, added="added" in what)
    for id in MIXED_IN_TEXT:
        name = id.partition("/")[0]
        yield known[name], "generate-mixed", partial(
            several.generate_mixed, case=store.find(id), method=known[name], likeliest=likeliest, count=NEW_TOKENS)
    for a, b in MIXED:
        name = b.partition("/")[0]
        pair = partial(mixed, first=store.find(a), second=store.find(b))
        yield known[a.partition("/")[0]], f"mixed-with-{name}", pair
        own, ways = a.partition("/")[0], {"life": several.mixed_life}
        if own in ("lora", "loha", "lokr"):  # of which a model takes several, beside or around others
            ways["apart"] = several.mixed_apart
        for what, function in ways.items():
            yield known[own], f"{what}-with-{name}", partial(function, first=store.find(a), second=store.find(b))
    for name in QUANTISED:
        for kind in KINDS if name == "lora" else KINDS[:1]:
            yield known[name], kind, partial(quantised, case=first_case(known[name]), method=known[name], kind=kind)
