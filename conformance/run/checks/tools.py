"""What a library offers around adapters: optimizers of LoRA's own, intruder dimensions, swapping adapters of other
ranks, the base model's state, names of a file mapped to others, layers found by a state dict.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from ...reference import formulas, optimizers, store
from ...reference.bases import BASES
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter, draw_base, draw_inputs, rng_of
from ...reference.method import KEY
from ...reference.methods import lora, methods
from ...reference.numpy_model import run
from . import bookkeeping
from .goldens import other, same_set, start
from .reject import refuse

PLUS = {"lr": 0.25, "loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 0.75, "loraplus_weight_decay": 0.125}


def stepped(driver, case, kind, options, want):
    """One step from the case's tensors is what `want(tensors, slopes, options)` makes of them."""
    start(driver, case, "float32")
    inputs, cotangent = case.tensors("input"), case.tensors("cotangent")["y"]
    before, slopes = driver.state_dict(), driver.gradients(inputs, cotangent)
    driver.optimise(kind, options, inputs, cotangent, 1)
    after = driver.state_dict()
    for key, value in want(before, slopes, options).items():
        close(f"{key} after a step, {kind}", after[key], value, "float32", floor=1)


def lora_plus(driver, case, method):
    """LoRA+: each kind of tensor at its own rate, with decay or without."""
    stepped(driver, case, "loraplus", PLUS, optimizers.lora_plus)


def riemannian(driver, case, method):
    """Gradients of A and B, each multiplied by the inverse of the other's Gram matrix; others as they are."""
    stepped(driver, case, "riemannian", {"lr": 0.125, "reg": 0.5}, optimizers.riemannian)


SMALL = 1e-6  # such gradients are near Adam's epsilon, where it sees of what size they are
STEPS = 3


def lora_fa(driver, case, method):
    """LoRA-FA over some steps. PEFT multiplies gradients and Gram matrix in bfloat16."""
    inputs, cotangent = case.tensors("input"), SMALL * case.tensors("cotangent")["y"]
    options = {"r": case.config["r"], "lora_alpha": case.config["lora_alpha"], "lr": 0.0625, "weight_decay": 0.25}
    start(driver, case, "float32")
    first = tensors = {k: np.asarray(v, np.float64) for k, v in driver.state_dict().items()}
    driver.optimise("lorafa", options, inputs, cotangent, STEPS)
    got, way = driver.state_dict(), optimizers.LoraFA(options, partial(lora.strength_of, case.config))
    for _ in range(STEPS):
        tensors = way.step(tensors, formulas.gradients(method, case.base, case.tensors("base"), tensors, case.config,
                                                       inputs, cotangent))
    for key, value in tensors.items():
        allowed = 0.05 * np.abs(value - first[key]).max()
        if np.abs(got[key] - value).max() > allowed:
            raise Failure(f"{key} after {STEPS} steps of LoRA-FA", str(value.ravel()[:5]), str(got[key].ravel()[:5]))
    same_set("factors A that LoRA-FA trains", [k for k, on in driver.names().items() if on and ".lora_A." in k], [])


def intruders(driver, case, method):
    """Directions of the adapted weight that the frozen one has not are weakened; the rest of the adapter stays, to its
    rank, in a new adapter, which is then active."""
    for top, part in ((10, 0.75), (2, 0.25)):
        start(driver, case, "float32")
        both = {path: [np.asarray(case.tensors(part)[f"{path}.weight"], np.float64) for part in ("base", "merged")]
                for path in case.targets}
        in_order = np.sort(np.concatenate([optimizers.likeness(*pair, top) for pair in both.values()]))
        gap = int(np.diff(in_order).argmax())  # a threshold that nothing is near to
        limit = float(in_order[gap : gap + 2].mean())
        driver.reduce_intruders({"new_adapter_name": "reduced", "top_k": top, "threshold_epsilon": limit,
                                 "mitigation_lambda": part})
        if list(driver.active()) != ["reduced"]:
            raise Failure("the active adapters after intruders were reduced", "['reduced']", str(driver.active()))
        driver.merge()
        got = driver.weights()
        for path, (W, merged) in both.items():
            rank = len(case.tensors("adapter")[f"{KEY}{path}.lora_A.weight"])
            B, A = optimizers.without_intruders(W, merged, rank, top, limit, part)
            close(f"{path}.weight, of whose {top} first directions those less like than {limit:.3g} are weakened to "
                  f"{part}", got[f"{path}.weight"], W + B @ A, "float32", floor=1)


def swapped_ranks(driver, case, method):
    """An adapter of a smaller or larger rank takes the place of one that is there, whether or not ranks are made equal
    first."""
    base, inputs, rng = case.tensors("base"), case.tensors("input"), rng_of("swapped ranks")
    rank = case.config["r"]
    with tempfile.TemporaryDirectory() as path:
        for another in (rank - 1, rank + 2):
            config = {**case.config, "r": another, "lora_alpha": 7}
            driver.build(case.base, base, config, "float32", case=f"{method.name}/swapped")
            tensors = draw_adapter(method, driver.state_dict(), set(), rng)
            driver.load(tensors)
            driver.save(str(Path(path, str(another))))
            want = formulas.output(method, case.base, base, tensors, config, inputs)
            for equal in (False, True):
                start(driver, case, "float32")
                if equal:
                    driver.prepare_hotswap(rank + 2)
                    bookkeeping.same_output(driver, case, "output after ranks were made equal")
                driver.hotswap(str(Path(path, str(another))), "default")
                close(f"output after an adapter of rank {another} took the place of one of rank {rank}",
                      driver.forward(inputs), want, "float32")
        start(driver, case, "float32")
        refuse("making ranks equal that are larger", lambda: driver.prepare_hotswap(rank - 1))


def base_state(driver, case, method):
    """The frozen model's own tensors under its own names, read and set while an adapter is on it."""
    start(driver, case, "float32")
    base = case.tensors("base")
    got = driver.base_state()
    same_set("names in the base model's state", got, base)
    for name, value in base.items():
        close(f"{name} in the base model's state", got[name], value, "float32")
    changed = {k: (0.5 * v).astype(np.float32) for k, v in base.items()}
    driver.set_base_state(changed)
    if not any(formulas.plain_name(k) in base for k in case.keys):
        want = formulas.output(method, case.base, changed, case.tensors("adapter"), case.config, case.tensors("input"))
        if method.tensors.fresh is None and method.tensors.made is None:
            close("output after the base model's tensors were set", driver.forward(case.tensors("input")), want,
                  "float32")
    driver.disable(True)
    close("output without adapter after the base model's tensors were set", driver.forward(case.tensors("input")),
          run(case.base, changed, case.tensors("input")), "float32")
    driver.disable(False)
    first = sorted(changed)[0]
    refuse("a state of the base model that lacks a tensor",
           lambda: driver.set_base_state({k: v for k, v in changed.items() if k != first}))
    refuse("a state of the base model with a tensor that it does not have",
           lambda: driver.set_base_state({**changed, "no.such": changed[first]}))


def merged_state(driver, case, method):
    """With a merged adapter, the base model's own state is whole, and holds the merged weights."""
    start(driver, case, "float32")
    driver.merge()
    got = driver.base_state()
    same_set("names in the base model's state, the adapter being merged", got, case.tensors("base"))
    for name, want in case.tensors("merged").items():
        close(f"{name} in the base model's state, the adapter being merged", got[name], want, "float32",
              other(case, "paper_merged").get(name))


def mapped_names(driver, case, method):
    """Names in a file that are those of another release of the model, brought to this one's by regular expressions."""
    start(driver, case, "float32")
    from safetensors.numpy import load_file, save_file

    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        file = Path(path, "adapter_model.safetensors")
        tensors = {k.replace("model.up.", "model.old.layer_up."): v for k, v in load_file(file).items()}
        save_file(tensors, file)
        driver.restore_with(path, case.base, case.tensors("base"), "float32",
                            {"key_mapping": {r"^old\.layer_(\w+)\.": r"\1.", r"up\.lora_A": "never"}})
    bookkeeping.same_output(driver, case, "output of an adapter whose names were mapped")


def revision(driver, case, method):
    """What is said of the base model's revision is kept in the config."""
    driver.build_with(case.base, case.tensors("base"), case.config, "float32", {"revision": "v7"}, case=case.id)
    if driver.config_of().get("revision") != "v7":
        raise Failure("revision in the config", expected="v7", got=str(driver.config_of().get("revision")))


def found_by_state(driver, case, method):
    """Where a state dict is given, its keys say which layers are adapted, whatever the config targets."""
    start(driver, case, "float32")
    tensors, base = case.tensors("adapter"), case.tensors("base")
    plain = {k.removeprefix(KEY): v for k, v in tensors.items()}
    last = case.targets[-1]
    fewer = {k: v for k, v in plain.items() if not k.startswith(f"{last}.")}
    config = {**case.config, "target_modules": [last]}
    for what, held in (("all its layers", plain), ("fewer layers", fewer)):
        got = driver.adapted_like(case.base, base, config, held, case=case.id)
        same_set(f"tensors of an adapter put where a state of {what} says", got, held)


def loaded_mixed(driver, case, method, on=True):
    """A model that takes adapters of several methods, made from a saved one of one method."""
    start(driver, case, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore_with(path, case.base, case.tensors("base"), "float32", {"mixed": True, "is_trainable": on})
    bookkeeping.same_output(driver, case, "output of an adapter loaded into a model for several methods")
    wanted = bookkeeping.trained(case.parameters) if on else []
    same_set(f"what is trained of it with is_trainable {on}", bookkeeping.trained(driver.names()), wanted)
    want = [sum(int(np.prod(case.keys[k.replace(".default", "")])) for k in wanted), case.count[1]]
    if (got := list(driver.count())) != want:
        raise Failure(f"parameter counts of such a model with is_trainable {on}", expected=str(want), got=str(got))


def loaded_mixed_for_use(driver, case, method):
    """`loaded_mixed`, where nothing is to be trained."""
    loaded_mixed(driver, case, method, False)


ORDER = [0, 1, 1, 2]  # of the layers that [[0, 2], [1, 3]] makes of three


def replicated(driver):
    """Layers that are run again share their weights, and have adapters of their own."""
    method, base, rng = methods()["lora"], BASES["decoder-llama"], rng_of("replicated")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"],
              "layer_replication": [[0, 2], [1, 3]]}
    weights, inputs = draw_base(base, rng), draw_inputs(base, {}, rng)
    deep = {**base, "depth": len(ORDER)}

    def deepened(weights):
        layers = {f"model.layers.{new}.{name}": weights[f"model.layers.{old}.{name}"]
                  for new, old in enumerate(ORDER)
                  for name in (k.removeprefix("model.layers.0.") for k in weights if k.startswith("model.layers.0."))}
        return {k: v for k, v in weights.items() if "layers." not in k} | layers

    def now(what, tensors, weights):
        close(what, driver.forward(inputs),
              formulas.output(method, deep, deepened(weights), tensors, config, inputs), "float32")

    driver.build(base, weights, config, "float32", case="lora/replicated")
    tensors = draw_adapter(method, driver.state_dict(), set(), rng)
    same_set("tensors of replicated layers", tensors, [
        f"{KEY}model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in range(4) for x in "AB"])
    driver.load(tensors)
    now("output of replicated layers", tensors, weights)
    own, whole = (sum(np.size(v) for v in held.values()) for held in (tensors, {**tensors, **weights}))
    numbers = [own, whole]
    if list(driver.count()) != numbers:
        raise Failure("parameter counts, weights that layers share counting once", str(numbers), str(driver.count()))
    name = "model.layers.1.mlp.weight"
    driver.assign({f"{KEY}{name}": 1.5 * weights[name]})
    now("output when a weight of a replicated layer has changed", tensors, {**weights, name: 1.5 * weights[name]})
    driver.assign({f"{KEY}{name}": weights[name]})
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.restore(path, base, weights, "float32")
    now("output of replicated layers, saved and loaded", tensors, weights)
    driver.disable(True)
    now("output of replicated layers without adapter", {}, weights)
    driver.disable(False)


AUTO = {"ForCausalLM": "CAUSAL_LM", "ForSeq2SeqLM": "SEQ_2_SEQ_LM", "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
        "ForFeatureExtraction": "FEATURE_EXTRACTION", "": None}


def auto(driver, kind):
    """The base model is found by the adapter's config, made of the class that the task asks for, and gets the adapter;
    where a tokenizer with more words lies beside it, the embedding grows."""
    target, own = ("q", {}) if kind == "ForSeq2SeqLM" else ("c_attn", {"fan_in_fan_out": True})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [target], "task_type": AUTO[kind], **own}
    for words in (0, 19) if kind == "ForCausalLM" else (0,):
        got = driver.auto(kind, config, words)
        before, after = np.array(got["before"]), np.array(got["after"])
        close("output of a model loaded by its adapter's folder", after[..., : before.shape[-1]], before, "float32")
        if got["task"] != f"PeftModel{kind}":
            raise Failure("class of that model", expected=f"PeftModel{kind}", got=got["task"])
        if got["trained"] or not any("lora_A" in name for name in got["trainable"]):
            raise Failure("what is trained of that model, and with is_trainable", got=str(
                (got["trained"], got["trainable"])))
        rows = words or 16
        if got["rows"] != rows:
            raise Failure(f"rows of its embedding, the tokenizer having {words} words", str(rows), str(got["rows"]))


def of(method) -> dict:
    """Function -> whether it can be asked of a method."""
    first = method.rows[0]
    layers = bool(method.formula or method.run) and "layers" in BASES[first.base]
    return {base_state: layers and not method.route}


def everything(first_case):
    """(method, what, function(driver)) of these checks."""
    known = methods()

    def each(function, name, *ids):
        for id in ids:
            case = store.find(f"{name}/{id}") if id else first_case(known[name])
            what = function.__name__.replace("_", "-") + (f"-{id.replace('/', '-')}" if id else "")
            yield known[name], f"tool-{what}", partial(function, case=case, method=known[name])

    yield from each(lora_plus, "lora", "linear/plain", "linear/bias-lora-only", "linear/modules-to-save",
                    "embedding/plain")
    yield from each(lora_plus, "dora", "linear/plain")
    yield from each(riemannian, "lora", "linear/rank-pattern", "linear/bias-lora-only")
    yield from each(lora_fa, "lora", "linear/rank-pattern", "linear/rslora", "linear/bias-lora-only")
    yield from each(intruders, "lora", "linear/plain", "linear/rank-pattern", "linear/rslora")
    yield from each(swapped_ranks, "lora", "linear/plain", "linear/rslora", "conv2d/plain")
    yield from each(merged_state, "lora", "linear/plain", "attention/plain", "conv2d/plain", "embedding/plain")
    yield known["lora"], "tool-replicated", replicated
    for kind, task in AUTO.items():
        yield known["lora"], f"tool-auto-{(task or 'none').lower().replace('_', '-')}", partial(auto, kind=kind)
    yield from each(mapped_names, "lora", "linear/plain")
    yield from each(revision, "lora", "linear/plain")
    for name in ("lora", "ia3", "loha", "oft", "boft"):
        yield from each(found_by_state, name, "")
    for name in ("lora", "loha", "lokr", "shira", "adalora"):
        yield from each(loaded_mixed, name, "")
        yield from each(loaded_mixed_for_use, name, "")
