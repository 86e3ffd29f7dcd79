"""Which adapter is active, trained, merged and saved, and by which config, after what is done with several of them."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from ...driver import Rejected
from ...reference import formulas, store
from ...reference.compare import Failure, close
from ...reference.methods import methods
from .goldens import same_set, start
from .reject import refuse


def same_output(driver, case, what):
    close(what, driver.forward(case.tensors("input")), case.tensors("out")["y"], "float32")


def trained(names: dict) -> list:
    return sorted(k for k, on in names.items() if on)


OTHERS = ("lora_alpha", "alpha")


def second_of(case, method, **more) -> dict:
    """The config of another adapter, of another strength where there is such a thing."""
    return {**case.config, **{k: 2 * case.config[k] + 1 for k in OTHERS if k in case.config}, **method.laws.second,
            **more}


def deletion(driver, case, method):
    """Deleting the active adapter makes the first one that is left active; none that is gone stays merged."""
    start(driver, case, "float32")
    before = driver.weights()
    for name in ("other", "third"):
        driver.add(name, second_of(case, method))
    driver.switch(["third"])
    driver.delete("third")
    if (active := list(driver.active())) != ["default"]:
        raise Failure("the active adapters after deleting the active one",
                      expected="['default'], the first of those that are left", got=str(active))
    same_output(driver, case, "output after deleting the active adapter")
    if not method.merges:
        return
    driver.switch(["other"])
    driver.load(case.tensors("adapter"), "other")
    driver.merge()
    with contextlib.suppress(Rejected):
        driver.delete("other")
    driver.unmerge()
    for name, got in driver.weights().items():
        close(f"{name} after deleting a merged adapter, or refusing to, and unmerging", got, before[name], "float32")
    driver.switch(["default"])
    same_output(driver, case, "output of the adapter that is left")


def deleted_whole(driver, case, method):
    """Nothing is left of an adapter that is deleted: no parameter, and no buffer."""
    driver.build(case.base, case.tensors("base"), case.config, "float32", case=case.id)
    before = driver.held()
    same_set("live names of parameters that the model holds", set(before) & set(case.parameters), case.parameters)
    driver.add("other", second_of(case, method))
    driver.delete("other")
    same_set("what the model holds after an adapter was added and deleted", driver.held(), before)


def one_of_several(driver, case, method):
    """Deleting one of two active adapters leaves the other one active, though a third came before it."""
    start(driver, case, "float32")
    smaller = {k: v if method.tensors.is_frozen(k) else 0.75 * v for k, v in case.tensors("adapter").items()}
    for name in ("other", "third"):
        driver.add(name, second_of(case, method))
        driver.load(smaller, name)
    driver.switch(["other"])
    output, own = driver.forward(case.tensors("input")), trained(driver.names())
    if method.tensors.gauges is None:
        want = formulas.output(method, case.base, case.tensors("base"), smaller, second_of(case, method),
                               case.tensors("input"))
        close("output of the second adapter", output, want, "float32")
    for both in (["other", "third"], ["third", "other"]):
        driver.switch(both)
        driver.delete("third")
        what = f"after deleting the third of {both}, which were active"
        if (active := list(driver.active())) != ["other"]:
            raise Failure(f"the active adapters {what}", expected="['other']", got=str(active))
        close(f"output {what}", driver.forward(case.tensors("input")), output, "float32")
        same_set(f"what is trained {what}", trained(driver.names()), own)
        driver.add("third", second_of(case, method))
    driver.switch(["other", "third"])
    for name in ("third", "other"):
        driver.delete(name)
    if (active := list(driver.active())) != ["default"]:
        raise Failure("the active adapters after deleting all that were active", expected="['default']",
                      got=str(active))
    same_output(driver, case, "output after deleting both adapters that were active")


BESIDE = ("modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices")


def reused_name(driver, case, method):
    """A name under which another adapter was, of any settings that the method has, has nothing left of it."""
    base, inputs = case.tensors("base"), case.tensors("input")
    pool = [(c, methods()[name]) for name, pack in store.packs().items() for c in pack.cases
            if methods()[name].peft_type == method.peft_type and c.base == case.base
            and c.agreed and not c.data.get("live")
            and c.config.get("bias", "none") == "none" and not any(c.config.get(k) for k in BESIDE)]
    start(driver, case, "float32")
    for c, own in pool + pool[:1]:
        try:
            driver.add("other", {**c.config, **method.laws.second})
        except Rejected:  # what it shares with the first one is another
            continue
        what = f"of an adapter as in {c.id}, under a name that was another's"
        same_set(f"keys {what}", driver.state_dict("other"), c.keys)
        driver.load(c.tensors("adapter"), "other")
        driver.switch(["other"])
        close(f"output {what}", driver.forward(inputs),
              formulas.output(own, case.base, base, c.tensors("adapter"), c.config, inputs), "float32")
        driver.switch(["default"])
        driver.delete("other")
    same_output(driver, case, "output of the adapter that was there all the time")


def switched_off(driver, case, method):
    """Adapters that were switched off are off until they are switched on again, whatever is off meanwhile."""
    start(driver, case, "float32")
    plain, names = case.tensors("plain")["y"], driver.names()
    for what, change in (("that were switched off", lambda: driver.switch_off(True)),
                         ("that were switched off, and are off by a context", lambda: driver.disable(True)),
                         ("that were switched off, after that context", lambda: driver.disable(False))):
        change()
        close(f"output of adapters {what}", driver.forward(case.tensors("input")), plain, "float32")
    driver.switch_off(False)
    same_output(driver, case, "output of adapters that are switched on again")
    same_set("what is trained when adapters are switched on again", trained(driver.names()), trained(names))


def unknown_name(driver, case, method):
    """Of several names to save, one is not there: nothing is written."""
    start(driver, case, "float32")
    with tempfile.TemporaryDirectory() as path:
        refuse("to save an adapter that is there, and one that is not,",
               lambda: driver.save_adapters(path, ["default", "nobody"]))
        if found := sorted(str(p.relative_to(path)) for p in Path(path).rglob("*.safetensors")):
            raise Failure("saving was refused, after files were written", expected="no file", got=str(found))


def failed_add(driver, case, method):
    """What could not be added leaves nothing behind: the model is as before, and the name is free."""
    start(driver, case, "float32")
    names = driver.names()
    refuse("an adapter whose targets match nothing",
           lambda: driver.add("other", {**second_of(case, method), "target_modules": ["nowhere"]}))
    same_set("live parameter names after a failed addition", driver.names(), names)
    same_output(driver, case, "output after a failed addition")
    driver.add("other", second_of(case, method))
    driver.switch(["other"])
    driver.delete("other")
    same_output(driver, case, "output after adding it rightly, and deleting it")


def held_configs(driver, case, method):
    """Which config belongs to which adapter, and to the active one; what saving and loading leave in it."""
    def held(what, name, **want):
        got = driver.config_of(name)
        if wrong := {k: got.get(k) for k in want if got.get(k) != want[k]}:
            raise Failure(f"config of {'the active adapter' if name is None else repr(name)} {what}",
                          expected=str({k: want[k] for k in wrong}), got=str(wrong))

    first, second = {"revision": "first"}, {"revision": "second"}
    driver.build(case.base, case.tensors("base"), {**case.config, **first}, "float32", case=case.id)
    held("that was put on", None, **first)
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        held("after saving it", "default", **first, inference_mode=case.config.get("inference_mode", False))
        if method.laws.single:
            return
        driver.add("other", {**second_of(case, method), **second})
        held("after adding another", None, **first)
        held("after adding it", "other", **second)
        driver.switch(["other"])
        held("after switching to it", None, **second)
        driver.switch(["default"])
        held("after switching back", None, **first)
        driver.load_adapter_with(path, "used", {})
        held("after loading it for use", "used", inference_mode=True)
        if method.prompt is None and not method.laws.second:
            driver.load_adapter_with(path, "trained", {"is_trainable": True})
            held("after loading it with is_trainable", "trained", inference_mode=False)
        held("after loading others", None, **first)


def loading_modes(driver, case, method):
    """An adapter that is loaded for training leaves the model in training mode; one for use does not."""
    def mode(what, want):
        if bool(driver.in_training()) != want:
            raise Failure(f"mode after {what}", expected="training" if want else "evaluation",
                          got="evaluation" if want else "training")

    start(driver, case, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        driver.train(True)
        mode("asking for training", True)
        told = driver.load_adapter_with(path, "trained", {"is_trainable": True})
        mode("loading an adapter with is_trainable", True)
        if told and any(told.values()) and not method.tensors.shared:
            raise Failure("keys that are told to be missing or too many in a whole file", "none", str(told))
        names = driver.names()
        want = [n.replace("default", name) for n in trained(case.parameters) for name in ("default", "trained")]
        same_set("what is trained with another adapter, loaded with is_trainable,", trained(names), want)
        driver.load_adapter_with(path, "used", {})
        mode("loading an adapter for use", False)
        same_set("what is trained with a third one, loaded for use,", trained(driver.names()), want)


def require_grad(driver, case, method):
    """What is trained, chosen by the adapters' names, whichever is active."""
    start(driver, case, "float32")
    driver.add("other", second_of(case, method))
    own = [n for n in trained(case.parameters) if ".default" in n]
    others = [n.replace(".default", ".other") for n in own]
    for what, names, on, want in (("the other is trained, too", ["other"], True, own + others),
                                  ("the active one is not", ["default"], False, others),
                                  ("neither is", ["other"], False, []),
                                  ("both are", ["default", "other"], True, own + others)):
        driver.require_grad(names, on)
        same_set(f"what is trained when {what}", [n for n in trained(driver.names()) if n in own + others], want)
    same_output(driver, case, "output after choosing what is trained")
    driver.require_grad(["default", "other"], False)
    driver.add("third", second_of(case, method))
    same_set("what is trained of the first two when neither is, and a third was added",
             [n for n in trained(driver.names()) if n in own + others], [])


def for_use(driver, case, method, mixed=False):
    """Of an adapter with inference_mode nothing is trained, what it saves whole included."""
    config = {**case.config, "inference_mode": True}
    if mixed:
        driver.build_with(case.base, case.tensors("base"), config, "float32", {"mixed": True}, case=case.id)
    else:
        driver.build(case.base, case.tensors("base"), config, "float32", case=case.id)
    same_set("what is trained of an adapter for use", trained(driver.names()), [])


def of(method) -> dict:
    """Function -> whether it can be asked of a method."""
    layers, several = bool(method.formula or method.run), not method.laws.single
    chosen = bool(method.rows[0].config.get("target_modules"))
    alike = layers and several and method.tensors.gauges is None and set(method.laws.second) <= {"inference_mode"} \
        and method.name != "adamss"  # whose shapes depend on the weights
    return {reused_name: alike, deletion: several, deleted_whole: several, switched_off: layers,
            one_of_several: several and method.laws.together and layers,
            failed_add: layers and several and chosen, unknown_name: True, held_configs: True,
            for_use: layers, require_grad: layers and several,
            loading_modes: layers and several and not method.laws.second}
