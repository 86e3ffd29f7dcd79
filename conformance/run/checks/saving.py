"""What lies in an adapter's folder, and what else than the folder is given when it is loaded; the dtypes of all that is
there; text that prompts begin as; an adapter that takes the place of another.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from ...reference import formulas, store
from ...reference.bases import BASES
from ...reference.compare import Failure, close
from ...reference.draw import draw_adapter, draw_base, draw_inputs, rng_of
from ...reference.method import KEY
from ...reference.methods import prefix_tuning
from . import bookkeeping
from .bookkeeping import same_output, trained
from .goldens import same_set, start
from .reject import refuse

WEIGHTS = "adapter_model.safetensors"
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def stored(path) -> dict:
    """Key -> (dtype, shape) of what lies in a folder, out of the file's head, since NumPy has no bfloat16."""
    data = Path(path, WEIGHTS).read_bytes()
    head = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return {k: (v["dtype"], v["shape"]) for k, v in head.items() if k != "__metadata__"}


def all_dtypes(driver, case, method):
    """On a base in 16 bits: every parameter, those of adapters that are added or loaded beside others included, what is
    in the file, and what is left when they are merged for good."""
    def check(what, wanted):
        have = driver.dtypes()
        wrong = {k: have[k] for k in have for name, want in wanted.items() if f".{name}" in f"{k}." and have[k] != want
                 and k.replace(f".{name}", ".default") in adapters}
        wrong |= {k: have[k] for k in have if k in plain and have[k] != kind}
        if wrong:
            raise Failure(f"dtypes {what}, on a base in {kind}", expected=str({None: kind, **wanted}), got=str(wrong))

    base = case.tensors("base")
    adapters = {k for k in case.parameters if ".default" in f"{k}."}
    plain = case.parameters.keys() - adapters
    for kind, keep in (("bfloat16", False), ("bfloat16", True), ("float16", True)):
        if kind not in driver.info()["dtypes"]:
            continue
        options, want = ({"autocast_adapter_dtype": False}, kind) if keep else ({}, "float32")
        driver.build_with(case.base, base, case.config, kind, options, case=case.id)
        check(f"of a new adapter, with {options}", {"default": want})
        with tempfile.TemporaryDirectory() as path:
            driver.save(path)
            wrong = {k: v for k, (v, _) in stored(path).items()
                     if v != CODES[want] and v[0] != "I" and not method.tensors.is_frozen(k)}
            if wrong:
                raise Failure(f"dtypes in the file of an adapter in {want}", expected=CODES[want], got=str(wrong))
            if not method.laws.single and method.name not in SHARED:
                driver.add_with("other", {**case.config, **method.laws.second}, options)
                check(f"of another adapter, with {options}", {"default": want, "other": want})
                if not method.laws.second:
                    kept = {"autocast_adapter_dtype": False}
                    for name, more, then in (("used", {}, "float32"), ("kept", kept, kind)):
                        driver.load_adapter_with(path, name, more)
                        check(f"of an adapter that is loaded beside others, with {more}", {"default": want, name: then})
        if method.merges:
            driver.unload(True)
            check("after merging for good", {})


def composed(driver, case, method):
    """A cartridge of two that were saved, one after the other; of its tokens as many are frozen as of the first's."""
    base = case.tensors("base")
    other = store.find(f"{method.name}/causal-lm/plain")
    with tempfile.TemporaryDirectory() as path:
        for part, c in (("first", case), ("second", other)):
            driver.build(case.base, base, c.config, "float32", case=c.id)
            driver.load(c.tensors("adapter"))
            driver.save(str(Path(path, part)))
        driver.compose([str(Path(path, part)) for part in ("first", "second")], str(Path(path, "both")))
        driver.restore(str(Path(path, "both")), case.base, base, "float32")
        both = {k: np.concatenate([v, other.tensors("adapter")[k]]) for k, v in case.tensors("adapter").items()}
        config = {**case.config, "num_virtual_tokens": len(next(iter(both.values())))}
        close("output of a composed cartridge", driver.forward(case.tensors("input")), formulas.output(
            method, case.base, base, both, config, case.tensors("input")), "float32")
        found = json.loads(Path(path, "both", "adapter_config.json").read_text())
    for field in ("num_virtual_tokens", "num_frozen_tokens"):
        if found[field] != config[field]:
            raise Failure(f"{field} of a composed cartridge", expected=str(config[field]), got=str(found[field]))


def begun_as_cache(driver, case, method):
    """A prompt of keys and values that begins as those of a longer text begins as those of its first words."""
    tokens, (heads, hidden) = case.config["num_virtual_tokens"], (case.base["heads"], case.base["hidden"])
    rng = rng_of("cache")
    cache = {f"{i}.{part}": rng.normal(size=(1, heads, tokens + 2, hidden // heads)).astype(np.float32)
             for i in range(case.base["depth"]) for part in ("keys", "values")}
    driver.build(case.base, case.tensors("base"), case.config, "float32", case=case.id)
    driver.begin_as(cache)
    want = {"prompt_embeddings": prefix_tuning.packed(cache, tokens)}
    for k, got in driver.state_dict().items():
        close(f"{k} of a prompt that begins as a cache", got, want[k], "float32")
    close("output of a prompt that begins as a cache", driver.forward(case.tensors("input")), formulas.output(
        method, case.base, case.tensors("base"), want, case.config, case.tensors("input")), "float32")


FROM_WORDS: dict[str, list] = {"prompt_tuning": [{"prompt_tuning_init": "SAMPLE_VOCAB"}],
                               "cpt": [{"inference_mode": False}]}


def prompt_dtypes(driver, case, method):
    """On a base in 16 bits a prompt has 32, whatever it begins as, also in its file; the model computes in 16."""
    begins = [{}, *FROM_WORDS.get(method.name, ())]
    for kind, more in ((kind, more) for kind in ("bfloat16", "float16") for more in begins):
        if kind not in driver.info()["dtypes"]:
            continue
        driver.build_with(case.base, case.tensors("base"), {**case.config, **more}, kind, {}, case=case.id)
        names = [k for k in case.parameters if ".default" in k]
        if wrong := {k: v for k, v in driver.dtypes().items() if k in names and v != "float32"}:
            raise Failure(f"dtypes of a new prompt {more or ''} on a base in {kind}", "float32", str(wrong))
        y = np.asarray(driver.forward(case.tensors("input")), np.float32)
        if kind == "bfloat16" and (y.view(np.uint32) & 0xFFFF).any():
            raise Failure(f"output with a prompt on a base in {kind}", "numbers of bfloat16", "others, of more bits")
        with tempfile.TemporaryDirectory() as path:
            driver.save(path)
            if wrong := {k: v for k, (v, _) in stored(path).items() if v[0] != "I" and v != "F32"}:
                raise Failure(f"dtypes in the file of a prompt {more or ''} on a base in {kind}", "F32", str(wrong))


SHARED = ("vblora", "unilora", "randlora", "vera", "tinylora", "pvera", "shadow")  # tensors of several adapters


def given_config(driver, case, method):
    """A config that is given counts, and not the file's; whether it is trained says `is_trainable` alone."""
    start(driver, case, "float32")
    other = {**case.config, "lora_alpha": 3 * case.config["lora_alpha"]}
    want = formulas.output(method, case.base, case.tensors("base"), case.tensors("adapter"), other,
                           case.tensors("input"))
    with tempfile.TemporaryDirectory() as path:
        driver.save(path)
        for asked in (False, True):
            given = {**other, "inference_mode": asked}
            driver.restore_with(path, case.base, case.tensors("base"), "float32",
                                {"config": given, "is_trainable": asked})
            what = f"of an adapter that is loaded with a config, is_trainable being {asked}"
            close(f"output {what}", driver.forward(case.tensors("input")), want, "float32")
            same_set(f"what is trained {what}", trained(driver.names()), trained(case.parameters) if asked else [])
            if (mode := driver.config_of("default")["inference_mode"]) == asked:
                raise Failure(f"inference_mode {what}", expected=str(not asked), got=str(mode))


def given_place(driver, case, method):
    """A folder within the one that is named, another name for the adapter, and a name that is there already."""
    start(driver, case, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save(str(Path(path, "within")))
        driver.restore_with(path, case.base, case.tensors("base"), "float32", {"subfolder": "within"})
        same_output(driver, case, "output of an adapter in a subfolder")
        driver.restore_with(path, case.base, case.tensors("base"), "float32",
                            {"subfolder": "within", "adapter_name": "mine"})
        same_output(driver, case, "output of an adapter with a name that is given")
        if (active := list(driver.active())) != ["mine"]:
            raise Failure("the active adapters, one being loaded by another name", expected="['mine']", got=str(active))
        same_set("live parameter names of an adapter with a name that is given", driver.names(),
                 [k.replace(".default", ".mine") for k in case.parameters])
        driver.build(case.base, case.tensors("base"), case.config, "float32", case=case.id)
        if method.laws.single:
            return
        driver.load_adapter_with(path, "default", {"subfolder": "within"})
        same_output(driver, case, "output after loading into an adapter that was there")
        if not method.laws.second:
            driver.load_adapter_with(path, "other", {"subfolder": "within"})
            driver.switch(["other"])
            same_output(driver, case, "output of an adapter in a subfolder, loaded beside another")


def other_file(driver, case, method):
    """Saved as torch does it, and loaded."""
    start(driver, case, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save_with(path, {"safe_serialization": False})
        found = sorted(p.name for p in Path(path).glob("adapter_model*"))
        if found != ["adapter_model.bin"]:
            raise Failure("files of weights, saved without safetensors", expected="adapter_model.bin", got=str(found))
        driver.restore(path, case.base, case.tensors("base"), "float32")
    same_output(driver, case, "output of an adapter from adapter_model.bin")


def given_state(driver, case, method):
    """A state dict that is given is what is saved, and not what the model holds."""
    start(driver, case, "float32")
    held = driver.state_dict()
    with tempfile.TemporaryDirectory() as path:
        driver.save_given(path, 2.0)
        same_output(driver, case, "output after another state was saved")
        driver.restore(path, case.base, case.tensors("base"), "float32")
    for k, got in driver.state_dict().items():
        want = held[k] if method.tensors.is_frozen(k) else 2 * held[k]
        close(f"{k} from a file of a state dict that was given", got, want, "float32")


def card(driver, case, method):
    """README.md says what library and what method it is; what someone wrote there stays when it is saved again."""
    start(driver, case, "float32")
    with tempfile.TemporaryDirectory() as path:
        driver.save_with(path, {})
        file = Path(path, "README.md")
        if not file.exists():
            raise Failure("saving wrote no README.md", got=str(sorted(p.name for p in Path(path).iterdir())))
        file.write_text(file.read_text() + "\nwritten by hand\n")
        driver.save_with(path, {})
        text = file.read_text()
    head = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    wanted = ["library_name: peft", *["- lora"] * (case.config["peft_type"] == "LORA"),
              *["pipeline_tag: text-generation"] * (case.config.get("task_type") == "CAUSAL_LM")]
    if missing := [w for w in wanted if w not in head]:
        raise Failure("the head of README.md", expected=str(wanted), got=f"without {missing}: {head}")
    if "written by hand" not in text:
        raise Failure("README.md, saved again, has lost what was written by hand", got=text[-300:])


def embeddings(driver, method):
    """Whole embedding layers lie beside the adapter where that is asked for, or where they are targets; what was
    trained in them comes back."""
    base = BASES["decoder-llama"]
    rng = rng_of("embeddings")
    weights, inputs = draw_base(base, rng), draw_inputs(base, {}, rng)
    emb = f"{KEY}model.embed_tokens"
    whole = {True: [f"{emb}.weight", f"{KEY}head.weight"], False: [], "auto": []}
    aimed = {True: [f"{emb}.base_layer.weight"], False: [], "auto": [f"{emb}.base_layer.weight"]}
    for targets, wanted in ((["q_proj"], whole), (["q_proj", "embed_tokens"], aimed)):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, "task_type": "CAUSAL_LM"}
        driver.build(base, weights, config, "float32", case="lora/embeddings")
        fresh = driver.state_dict()
        drawn = draw_adapter(method, fresh, set(), rng)
        own = {k for k in drawn if "base_layer" not in k}
        for how, more in wanted.items():
            driver.build(base, weights, config, "float32", case="lora/embeddings")
            driver.load({k: v if k in own or more else fresh[k] for k, v in drawn.items()})
            out = driver.forward(inputs)
            with tempfile.TemporaryDirectory() as path:
                driver.save_with(path, {"save_embedding_layers": how})
                what = f"with targets {targets}, save_embedding_layers being {how}"
                same_set(f"keys in the file {what}", stored(path), own | set(more))
                driver.restore(path, base, weights, "float32")
                close(f"output after saving and loading, {what}", driver.forward(inputs), out, "float32")


WORDS = ("begins", "a", "prompt", "which", "this")


def tokenizer(folder) -> str:
    """The smallest files of a tokenizer that splits at spaces; word i of WORDS is token i + 2."""
    ids = {"[UNK]": 0, "[PAD]": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}
    Path(folder, "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "[UNK]"}}))
    Path(folder, "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]"}))
    return str(folder)


def text(driver, case, method):
    """A prompt that begins as a text: its words' embeddings, over and over where it is short, cut where it is long."""
    base = case.tensors("base")
    words = next(v for k, v in base.items() if "emb" in k and len(v) == case.base["vocab"])
    own = "num_transformer_submodules"
    with tempfile.TemporaryDirectory() as folder:
        for line, count in (("a prompt which begins", 4), ("a prompt", 5), ("this", 3),
                            ("this prompt which begins a prompt", 2)):
            config = {**case.config, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": line,
                      "num_virtual_tokens": count, "tokenizer_name_or_path": tokenizer(folder)}
            driver.build(case.base, base, config, "float32", case=f"{method.name}/text")
            state = driver.state_dict()
            rows = np.asarray(next(v for k, v in state.items() if k.endswith("prompt_embeddings")))
            total = count * (config.get(own) or (2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1))
            ids = [WORDS.index(word) + 2 for word in line.split()]
            close(f"a prompt of {total} tokens that begins as {line!r}", rows, words[np.resize(ids, total)], "float32")


def swapped(driver, case, method):
    """A saved adapter takes the place of one that is there, its strength and its layers included, and whatever was
    before; one that does not fit is refused, and nothing changes."""
    base, inputs = case.tensors("base"), case.tensors("input")
    targets = case.config["target_modules"]
    second = bookkeeping.second_of(case, method)
    rng = rng_of("swapped")
    with tempfile.TemporaryDirectory() as path:
        for name, config in (("same", second), ("fewer", {**second, "target_modules": targets[:1]}),
                             ("other-kind", {**case.config, "use_rslora": not case.config.get("use_rslora")})):
            driver.build(case.base, base, config, "float32", case=case.id)
            tensors = draw_adapter(method, driver.state_dict(), set(), rng)
            driver.load(tensors)
            driver.save(str(Path(path, name)))
            if name == "other-kind":
                break
            start(driver, case, "float32")
            driver.hotswap(str(Path(path, name)), "default")
            want = formulas.output(method, case.base, base, tensors, config, inputs)
            close(f"output after another adapter took the place ({name} layers)", driver.forward(inputs), want,
                  "float32")
            got = driver.state_dict()
            for k, v in tensors.items():
                close(f"{k} after another adapter took the place", got[k], v, "float32")
        start(driver, case, "float32")
        refuse("an adapter of another kind in the place of one",
               lambda: driver.hotswap(str(Path(path, "other-kind")), "default"))
        same_output(driver, case, "output after that was refused")


def of(method) -> dict:
    """Function -> whether it can be asked of a method."""
    layers = bool(method.formula or method.run)
    return {all_dtypes: layers and method.name != "ln_tuning", prompt_dtypes: method.prompt is not None,
            given_place: not method.files and layers, other_file: not method.files, card: True,
            given_state: layers and method.tensors.gauges is None and not method.files}


def of_some():
    """(method, what, function, arguments) of what is asked of few methods."""
    plain = store.find("lora/linear/plain")
    yield "lora", "given-config", given_config, {"case": plain}
    yield "lora", "embeddings", embeddings, {}
    for kind, id in (("linear", "linear/plain"), ("conv2d", "conv2d/plain"), ("rslora", "linear/rslora")):
        yield "lora", f"swapped-{kind}", swapped, {"case": store.find(f"lora/{id}")}
    yield "cartridge", "composed", composed, {"case": store.find("cartridge/causal-lm/two-frozen")}
    for id in ("cartridge/causal-lm/plain", "prefix_tuning/causal-lm/plain"):
        yield id.partition("/")[0], "begun-as-cache", begun_as_cache, {"case": store.find(id)}
    for id in ("prompt_tuning/causal-lm/masked", "prompt_tuning/encoder-decoder/plain"):
        yield "prompt_tuning", f"text-{id.split('/')[1]}", text, {"case": store.find(id)}
