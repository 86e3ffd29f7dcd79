"""The formulas as an implementation, NumPy only. With a seeded fault it is an implementation wrong in one way.

Live names and counts come from the recorded case, since they are conventions and no formula; the rest is computed.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..driver import OPERATIONS, Driver, Rejected, Unsupported
from ..reference import arrow, beginnings, dropout, formulas, generating, kappa, noise, optimizers, rules, store, tying
from ..reference.combine import combined
from ..reference.laws import rebuilt_inputs
from ..reference.method import KEY, slots
from ..reference.methods import lily, lora, methods, monteclora, xlora
from ..reference.methods.prefix_tuning import packed
from ..reference.numpy_model import apply_layer, parameters_of, sites

# what faults change besides operations
OWN = ("drop", "keep", "thinned", "by_type", "take_from_base", "words", "text", "cast", "saved", "drawn",
       "taken", "rebuilding", "is_unsaved", "likeness", "ties", "shared_by", "mapped",
       "is_refused", "unpadded", "write")


class Oracle(Driver):
    def __init__(self, fault=None):
        self.fault = fault
        change = fault.change if fault else {}
        self.faulty = {k: v for k, v in change.items() if k in ("formula", "run", "prompt", "loss", "route")}
        self.rules = {**rules.RULES, **change.get("rules", {})}
        for op, replacement in change.items():
            if op in (*OPERATIONS, *OWN):
                setattr(self, op, partial(replacement, self, getattr(self, op)))

    def info(self):
        return {"name": "oracle", "version": self.fault.id if self.fault else "0",
                "dtypes": ["float64", "float32", "bfloat16", "float16"]}

    def build(self, base, weights, config, dtype, case="", seed=0):
        if base.get("model") == "skeleton" or case.endswith("/decomposed"):
            raise Unsupported("models without values, and randomised decompositions")
        self.method: Any = methods()[case.split("/")[0]] if case else None
        self.case: Any = next((c for c in store.all_cases() if c.id == case), None)
        self.base, self.dtype, self.seed = base, dtype, seed
        self.base_weights = {k: np.asarray(v, np.float64) for k, v in weights.items()}
        self.adapters: dict = {}
        self.chosen, self.merged, self.off = [], [], 0
        self.factors: dict[str, float] = {}  # by adapter, where its strength was changed
        self.kept, self.mixed = dtype, False  # the dtype of the first adapter; are they of several methods?
        self.others: dict[str, str] = {}  # the dtypes of the others
        self.for_training, self.before = True, self.factors
        self.allocator: Any = None
        self.told: tuple = ((), {})  # the gradients that were asked for last, and what of
        self.training, self.rng = False, np.random.default_rng(seed)
        self.routed: Any = None
        self.mapping: dict[str, str] = {}
        self.still: tuple = ()  # slots that an optimizer freezes
        self.uncast = 0
        self.asked: dict[str, bool] = {}  # by adapter, where it was said by name whether it is trained
        self.begun, self.loose = "/beginnings/" in case, case.endswith("/defaults")
        if self.begun:
            method, _, id = case.split("/")
            self.row = next(r for r in store.rows("beginnings") if (r["method"], r["id"]) == (method, id))
            self.adapters, self.chosen = {"default": (config, self.begin(self.row, config))}, ["default"]
            self.base_weights |= {k: beginnings.drawn(want, self.rng) for k, want in self.row["weights"].items()}
            if self.row.get("data"):
                self.take_from_base()
        elif config is not None:
            try:
                self.add("default", {**store.defaults(config["peft_type"]), **config} if self.loose else config)
            except (IndexError, KeyError, TypeError, ValueError) as e:
                if self.loose:
                    raise Rejected(f"layers that are too small: {e}") from e
                raise
            self.chosen = ["default"]
            if "/converted/" in case:
                tensors = {k: self.rng.normal(size=np.shape(v)) for k, v in self.adapters["default"][1].items()}
                self.adapters["default"] = (config, tensors)
                self.take_from_base()

    def penalty(self):
        config, tensors = self.adapters[self.chosen[0]]
        if config.get("kasa_config"):
            return lora.kasa_penalty(tensors, config)
        if self.method.name != "monteclora":
            raise Unsupported("further terms of the loss")
        return monteclora.penalty(tensors, config) if self.training else 0.0

    def take_from_base(self):
        """What a new adapter adds, the base weights lose."""
        self.base_weights = {k: 2 * v - self.folded(["default"])[k] for k, v in self.base_weights.items()}

    def build_from_data(self, base, weights, config, dtype, data, case="", seed=0, batches=1):
        self.build(base, weights, config, dtype, case, seed)

    def begin(self, row, config) -> dict:
        """A new adapter as the row describes it: how it is drawn is convention, and no formula."""
        tensors: dict = {}
        for name, want in row["tensors"].items():
            own = 0 if row.get("twins") else len(tensors)
            rng = np.random.default_rng([self.seed, own])
            if "at" in want and "std" in want:  # by the config's seed
                rng = np.random.default_rng([config.get(row["key"], 0), own])
                want = {k: v for k, v in want.items() if k != "at"}
            tensors[name] = beginnings.drawn(want, rng)
        return tensors

    def like(self, config):
        """The recorded case of this config on this base model, be it of another variant of the method."""
        if self.recorded(config):
            return self.case
        if self.case is None or self.mixed or len(self.adapters) == 0:
            return None
        return next((c for c in store.all_cases() if c.config == config and c.base == self.base), None)

    def is_refused(self, config) -> bool:
        """Is it the config of a recorded case with one field out of range, in itself or beside the adapter that is
        there? Which these are is convention."""
        rows = [r for r in store.rows("refused") if r["case"] == self.case.id and bool(self.adapters) == (
            "beside" in r)]
        own = {**self.case.config, **(self.method.laws.second if self.adapters else {})}
        return any(config == {**own, field: value} for r in rows for field, value in r["refused"])

    def recorded(self, config) -> bool:
        """Is this the config of the recorded case, but for what it is made for, and what a layer says itself?"""
        other = {"inference_mode": None, "fan_in_fan_out": None}
        other |= {k: None for k in config if "dropout" in k and not self.case.config.get(k)} if self.case else {}
        return self.case is not None and {**config, **other} == {**self.case.config, **other}

    def full_config(self, config):
        known = store.defaults(config["peft_type"])
        rows = [r for r in store.configs().values() if r["defaults"]["peft_type"] == config["peft_type"]]
        for row in rows:
            known = next((held for _, held in row.get("fewer", ()) if row["required"].keys() - config.keys()), known)
        more = [changes for r in rows for id, changes in r["changes"].items()
                if config.items() >= store.find(id).config.items()]
        more += [changes for r in rows for field, value, changes in r["others"] if config.get(field) == value]
        own = {"peft_version": "0.0", "auto_mapping": None, "base_model_name_or_path": None}
        return {**known, **{k: v for k, v in own.items() if k in known}, **config, **(more[0] if more else {})}

    def read_config(self, path, given):
        return {**given, **json.loads(Path(path, "adapter_config.json").read_text())}

    def config_of(self, name=None):
        return {"inference_mode": False, **self.adapters[name or self.chosen[0]][0]}

    def targets(self, config):
        if self.recorded(config):
            return self.case.targets
        if "model_type" in self.base and not config.get("target_modules"):
            keys = self.by_type(self.base["model_type"])
            return [p for p, _, _ in self.base["layers"] if any(k.startswith(f"{KEY}{p}.") for k in keys)]
        if self.method.name == "trainable_tokens" and not config.get("target_modules") and "input_layer" in self.base:
            return [self.base["input_layer"]]
        if "layers" in self.base:
            found = rules.adapted(self.base, config, self.rules)
        else:
            wanted = config.get("target_modules") or []
            wanted = [*wanted, "head"] if self.ties(config) and "embed_tokens" in wanted else wanted
            found = [p for p in sites(self.base, self.base_weights) if p.split(".")[-1] in wanted or p in wanted]
        if not found and not self.method.prompt and not (self.method.route and not config.get("target_modules")):
            raise Rejected(f"target_modules {config.get('target_modules')} match nothing")
        return found

    def ties(self, config):
        """Is the head's adapter the embedding's?"""
        return self.base.get("tied") and config.get("ensure_weight_tying")

    def by_type(self, model_type) -> dict:
        """The tensors that a method has on such a model where nothing is said: a convention, and no rule."""
        row = next(r for r in store.rows("targets") if (r["method"], r["id"]) == (self.method.name, "by-type"))
        return row["types"][model_type]

    def add(self, name, config):
        like, method = self.like(config), self.method_of(config)
        validate(config, method)
        if self.case and self.is_refused(config):
            raise Rejected("a field out of range")
        if self.adapters and "bias" in config and sum(
                c.get("bias", "none") != "none" for c, _ in [(config, None), *self.adapters.values()]) > 1:
            raise Rejected("several adapters that train biases")
        if config.get("kasa_config"):
            self.base_weights = lora.truncated(self.base, self.base_weights, config["r"], self.targets(config))
        if self.begun:
            self.adapters[name] = config, self.begin(self.row, config)
            return
        rng = np.random.default_rng(self.seed)
        whole = {**config, method.tensors.unsaved[0]: True} if method.tensors.unsaved else config
        shapes = formulas.expected_shapes(method, self.base, self.base_weights, whole, self.targets(config))
        if like:
            shapes = like.keys
        elif "model_type" in self.base and not config.get("target_modules"):
            shapes |= {k: v for k, v in self.by_type(self.base["model_type"]).items() if v is not None}
        elif "layers" in self.base:
            for path in rules.saved(self.base, config, self.rules):
                shapes |= {KEY + k: v.shape for k, v in self.base_weights.items() if k.rpartition(".")[0] == path}
        elif self.ties(config):
            shapes |= tying.shapes(self.base_weights, config)
        shapes = method.live(config) or shapes
        tensors = {}
        for key, shape in shapes.items():
            value = next((v for slot, v in method.tensors.neutral.items() if key.endswith(slot)), None)
            tensors[key] = np.full(shape, value) if value is not None else rng.normal(size=tuple(shape)) * 0.1
            if formulas.plain_name(key) in self.base_weights:
                tensors[key] = self.base_weights[formulas.plain_name(key)].copy()
            path, of_tokens, _ = key.removeprefix(KEY).partition(".token_adapter.")
            if of_tokens:
                chosen = config["trainable_token_indices"]
                chosen = chosen if isinstance(chosen, list) else next(
                    v for k, v in chosen.items() if f".{path}".endswith(f".{k}"))
                tensors[key] = self.base_weights[f"{path}.weight"][chosen].copy()
        at = {p: s for p, s in sites(self.base, self.base_weights).items() if p in self.targets(config)}
        made = method.tensors.made(config, list(at.values())) if method.tensors.made else {}
        tensors.update({k: np.asarray(v, np.float64) for k, v in made.items()})
        if method.tensors.fresh:
            for path, site in at.items():
                if own := slots(tensors, path):
                    new = method.tensors.fresh(site, {**own, **made}, config)
                    tensors.update({f"{KEY}{path}.{k}": np.asarray(v, np.float64) for k, v in new.items()})
        if config.get("prompt_tuning_init") == "TEXT":
            tensors = {k: self.text(config, len(v)) if k.endswith("prompt_embeddings") else v
                       for k, v in tensors.items()}
        if config.get("prompt_tuning_init") == "SAMPLE_VOCAB":
            tensors = {k: self.words(len(v)) for k, v in tensors.items()}
        if self.ties(config):
            tensors = tying.both(tensors)
        for keys in self.shared(config, tensors):
            tensors |= dict.fromkeys(keys, tensors[keys[0]])
        self.adapters[name] = (copy.deepcopy(config), self.pruned(config, tensors))
        if config.get("inference_mode") and not method.prompt:
            self.asked[name] = False

    def shared(self, config, tensors) -> list:
        """Groups of keys under which there is one tensor of Lily's."""
        groups: dict = {}
        for slot, stride in ((lily.A, config.get("stride_A", 1)), (lily.B, len(tensors))):
            kinds: dict = {}
            for key in (k for k in tensors if k.endswith(slot)):
                kinds.setdefault((key.removesuffix(slot).split(".")[-2], np.shape(tensors[key])), []).append(key)
            for kind, keys in kinds.items():
                for i, key in enumerate(keys):
                    groups.setdefault((kind, slot, self.shared_by(i, stride)), []).append(key)
        return list(groups.values())

    def shared_by(self, i, stride):
        """Which layers of a kind share A: a number for each."""
        return i // stride

    def embedding(self):
        return next(v for k, v in self.base_weights.items() if "emb" in k and len(v) == self.base["vocab"])

    def words(self, count):
        """Rows of the embedding, drawn."""
        return self.embedding()[self.rng.integers(0, len(self.embedding()), count)]

    def text(self, config, count):
        """The embeddings of a text's words, over and over."""
        held = json.loads(Path(config["tokenizer_name_or_path"], "tokenizer.json").read_text())["model"]["vocab"]
        ids = [held[word] for word in config["prompt_tuning_init_text"].split()]
        return self.embedding()[np.resize(ids, count)]

    def delete(self, name):
        del self.adapters[name]
        self.chosen = [a for a in self.chosen if a != name] or list(self.adapters)[:1]

    def load(self, tensors, name="default"):
        config, own = self.adapters[name]
        if self.method.tensors.expanded:
            tensors = self.method.tensors.expanded(tensors, config)
        tensors = {**{k: v for k, v in own.items() if self.is_unsaved(k, config)}, **tensors}
        if self.ties(config):
            tensors = tying.both(tensors)
        problems = [f"missing {k}" for k in own if k not in tensors] + [f"unexpected {k}" for k in tensors
                                                                        if k not in own]
        problems += [f"{k} has shape {v.shape}, not {own[k].shape}" for k, v in tensors.items()
                     if k in own and v.shape != own[k].shape]
        problems += [f"{k} is not finite" for k, v in tensors.items() if not np.isfinite(v).all()]
        if problems:
            raise Rejected("; ".join(problems))
        self.adapters[name] = (config, {k: np.asarray(v, np.float64) for k, v in tensors.items()})

    def assign(self, tensors):
        config, own = self.adapters["default"]
        new = {k if k in own else k.replace(".default", ""): np.asarray(v, np.float64) for k, v in tensors.items()}
        self.adapters["default"] = (config, {**own, **new})

    def saved(self, name="default"):
        """What a checkpoint holds of an adapter, unrounded."""
        config, tensors = self.adapters[name]
        tensors = {k: v for k, v in tensors.items() if not self.is_unsaved(k, config)}
        return self.method.saved(self.pruned(config, tensors), config)

    def is_unsaved(self, key, config):
        """Is this a tensor that the config leaves out of a checkpoint?"""
        field, slots = self.method.tensors.unsaved or ("", ())
        return not config.get(field, True) and any(key == s or key.endswith(f".{s}") for s in slots)

    def pruned(self, config, tensors):
        """What is left of the ranks of an adapter that shrank; `rank_pattern` is then by the path of a layer."""
        if self.method.budget is None or not self.method.budget.pruned or not config.get("rank_pattern"):
            return tensors
        return self.method.budget.pruned(tensors, {k: np.array(v) for k, v in config["rank_pattern"].items()})

    def of(self, name):
        """(the method, the tensors, the config with what its strength is now) of an adapter."""
        config, tensors = self.adapters[name]
        field, factor = "alpha" if "alpha" in config else "lora_alpha", self.factors.get(name, 1.0)
        strong = config if factor == 1 else {**config, field: config.get(field, 8) * factor}
        return self.method_of(config), tensors, strong

    def method_of(self, config):
        if like := self.like(config):
            return methods()[like.pack.data["method"]]
        return methods()[config["peft_type"].lower()] if self.mixed else self.method

    def folded(self, names):
        weights = self.base_weights
        for name in names:
            method, tensors, config = self.of(name)
            before, factor = weights, 1.0
            if not {"alpha", "lora_alpha"} & self.adapters[name][0].keys():
                factor = self.factors.get(name, 1.0)
            weights, _ = formulas.adapted(method, self.base, weights, tensors, config,
                                          formula=self.faulty.get("formula"), frozen=self.base_weights)
            if factor != 1:
                weights = {k: before[k] + factor * (v - before[k]) for k, v in weights.items()}
        return weights

    def forward(self, inputs, adapter_names=None):
        if "inputs_embeds" in inputs:
            inputs = self.with_ids(dict(inputs))
        if self.uncast and self.kept != self.dtype:
            raise Rejected(f"an input in {self.dtype} for an adapter in {self.kept}")
        if self.routed:
            return self.rounded(formulas.output(self.method, self.base, self.base_weights, {}, {}, inputs,
                                                route=self.routed))
        if adapter_names is not None:
            if not self.method.laws.mixed_batch:
                raise Unsupported("mixed batches of this method")
            if self.off:
                adapter_names = [None] * len(adapter_names)
            elif self.merged or set(adapter_names) - {None, *self.adapters}:
                raise Rejected(f"one run for {adapter_names}, of {[*self.adapters]}, merged: {self.merged}")
            if len(adapter_names) != len(next(iter(inputs.values()))):
                raise Rejected("as many names as samples")
            picked = [self.run(inputs, [] if n is None else [n])[i] for i, n in enumerate(adapter_names)]
            return self.rounded(np.stack(picked))
        try:
            return self.rounded(self.run(inputs, [] if self.off else self.merged or self.chosen))
        except (IndexError, KeyError, TypeError, ValueError) as e:
            if self.loose:
                raise Rejected(f"layers that are too small: {e}") from e
            raise

    def with_ids(self, inputs):
        """The words for what is embedded already."""
        emb = next(v for k, v in self.base_weights.items() if k.endswith("embed_tokens.weight"))
        off = np.abs(np.asarray(inputs.pop("inputs_embeds"))[..., None, :] - emb).max(-1)
        return {**inputs, "input_ids": off.argmin(-1)}

    def run(self, inputs, names):
        if not names:
            return formulas.output(self.method or next(iter(methods().values())), self.base, self.base_weights, {}, {},
                                   inputs, prompt=lambda *a: {})
        if self.training and len(names) > 1 and dropout.of(self.method):
            return formulas.output(self.method, self.base, self.base_weights, {}, {}, inputs,
                                   route=partial(self.dropping_all, names))
        weights = self.folded(names[:-1])
        method, tensors, config = self.of(names[-1])
        change = {**self.faulty, **self.drawn(weights, config)}
        with np.errstate(all="ignore"):
            return formulas.output(method, self.base, weights, tensors, config, inputs,
                                   frozen=self.base_weights, **change)

    def drawn(self, weights, config):
        """What is drawn, in training above all."""
        found = noise.drawn(self.method, weights, config, self.training, self.rng) if self.method else None
        if found is not None:
            return found
        return {"route": partial(self.dropping, weights)} if self.training and dropout.of(self.method) else {}

    def dropping(self, weights, base, folded, tensors, config, inputs):
        """The adapted layers with their dropout, if there is any."""
        found = {}
        for d in dropout.of(self.method):
            if not config.get(d.rate) or any(config[k] != v for k, v in d.more.items()):
                continue
            for path in self.targets(config):
                t = {**slots(tensors, path), **formulas.shared_tensors(self.method, tensors)}
                site = sites(base, weights)[path]
                found[path] = lambda _, x, d=d, site=site, t=t: self.drop(d, site, t, config, x)
        return found

    def dropping_all(self, names, base, folded, _, __, inputs):
        """The adapted layers of several adapters, each with its own dropout."""
        found: dict = {}
        for name in names:
            _, tensors, config = self.of(name)
            for path, function in self.dropping(self.base_weights, base, folded, tensors, config, inputs).items():
                found.setdefault(path, []).append(function)
        site = sites(base, self.base_weights)
        return {path: lambda _, x, path=path, each=each: self.added_up(apply_layer(site[path], x), each, x)
                for path, each in found.items()}

    def added_up(self, y, each, x):
        return y + sum(function(None, x) - y for function in each)

    def drop(self, d, site, t, config, x):
        """A layer's output, what is dropped being drawn."""
        if d.apart:
            both = replace(d, apart=""), site, {**t, d.apart: 0 * t[d.apart]}, config, x
            whole = self.keep(d, site, t, config[d.rate], x)
            rest = [dropout.output(d, self.method.formula, site, each, config, x, whole) for each in (t, both[2])]
            return self.drop(*both) + rest[0] - rest[1]
        return dropout.output(d, self.method.formula, site, t, config, x, self.keep(d, site, t, config[d.rate], x))

    def keep(self, d, site, t, rate, x):
        """What is kept; for the input, of each of its rows."""
        kept = dropout.choices(d, site, t, rate, x)
        odds = (1 - rate) ** kept.sum(1) * rate ** (1 - kept).sum(1)
        shape = () if d.drops != "input" else x.shape[:1] if site.kernel else x.shape[:-1]
        return kept[self.rng.choice(len(kept), shape, p=odds / odds.sum())]

    def train(self, on):
        self.training = on

    def in_training(self):
        return self.training

    def require_grad(self, names, on):
        self.asked |= dict.fromkeys(names, on)

    def rounded(self, y):
        y = np.array(y, np.float64 if self.dtype == "float64" else np.float32)
        if self.dtype == "bfloat16" != self.kept:  # adapters of more bits than the base has
            bits = y.view(np.uint32)
            bits += 0x8000
            bits &= 0xFFFF0000
        return y

    def live_gradients(self, inputs, cotangent):
        return {k: v for k, v in self.gradients(inputs, cotangent).items() if not self.is_left_out(k)}

    def is_left_out(self, key):
        """Is this a tensor that is trained no longer?"""
        return bool(self.allocator) and not self.method.budget.pruned and not self.allocator.kept.get(key, True)

    def gradients(self, inputs, cotangent):
        if self.dtype == "float64":
            raise Unsupported("gradients are finite differences, good to float32")
        config, tensors = self.adapters[self.chosen[0]]
        drawn = self.drawn_once(config)
        asked = (tensors, cotangent, bool(drawn), *inputs.values())
        if not all(a is b or (isinstance(a, np.ndarray) and np.array_equal(a, b))
                   for a, b in itertools.zip_longest(asked, self.told[0])):
            change = {**self.faulty, **self.rebuilding(tensors, config, inputs), **drawn}
            found = formulas.gradients(self.method, self.base, self.base_weights, tensors, config, inputs, cotangent,
                                       **change)
            found = self.unpadded(found, config)
            still = self.case.data["frozen"] if self.recorded(config) else ()
            self.told = (asked, {k: self.rounded(v) for k, v in found.items() if v.size and k not in still})
        return dict(self.told[1])

    def unpadded(self, found, config):
        """Gradients, without those of words that pad: torch gives their embeddings none."""
        for path, _, args in self.base.get("layers", ()):
            if (word := args.get("padding_idx")) is None:
                continue
            if (A := f"{KEY}{path}.lora_embedding_A") in found:
                found[A][:, word] = 0
            if (rows := f"{KEY}{path}.trainable_tokens_delta") in found and word in config["token_indices"]:
                found[rows][config["token_indices"].index(word)] = 0
        return found

    def drawn_once(self, config) -> dict:
        """As `drawn`, of what is no dropout, and the same whenever it is asked for, as differences have to be."""
        seed = int(self.rng.integers(2**32))

        def draw() -> dict:
            rng = np.random.default_rng(seed)
            return noise.drawn(self.method, self.base_weights, config, self.training, rng) or {}

        return {k: lambda *args, k=k: draw()[k](*args) for k in draw()}

    def rebuilding(self, tensors, config, inputs):
        """What VeLoRA does to gradients in training; its direction is taken from the inputs, and held."""
        if not self.training or self.method.name != "velora":
            return {}
        how = config["velora_config"] = {"init_type": "batch_average_once", "scale": 1.0, **config["velora_config"]}
        known = {p: slots(tensors, p)[rebuilt_inputs.V] for p in self.targets(config)}
        taken = self.taken(how, known)
        route = partial(rebuilt_inputs.route, weights=self.base_weights)
        formulas.output(self.method, self.base, self.base_weights, tensors, config, inputs,
                        route=lambda base, folded, *rest: route(taken, base, folded, *rest))
        tensors.update({f"{KEY}{p}.{rebuilt_inputs.V}": v for p, v in taken.items()})
        return {"route": lambda base, folded, t, c, inputs, held=None: route(dict(taken), base, folded, t, c, inputs,
                                                                             held)}

    def taken(self, how, known):
        """Directions that are known before a batch is seen."""
        if how["init_type"] == "random":
            return known
        return {p: v for p, v in known.items() if np.any(v)} if how["init_type"] == "batch_average_once" else {}

    def step(self, inputs, cotangent, rate):
        config, tensors = self.adapters[self.chosen[0]]
        found = self.live_gradients(inputs, cotangent)
        if self.ties(config):
            found = tying.summed(found)
        for keys in self.shared(config, tensors):
            found |= dict.fromkeys(keys, sum(np.asarray(found[k], np.float64) for k in keys))
        self.adapters[self.chosen[0]] = (config, {k: v - rate * found.get(k, 0) for k, v in tensors.items()})

    def optimise(self, kind, options, inputs, cotangent, steps):
        config, tensors = self.adapters["default"]
        if kind == "lorafa":
            step, self.still = optimizers.LoraFA(options, partial(lora.strength_of, config)).step, ("lora_A",)
        else:
            plain = {"loraplus": optimizers.lora_plus, "riemannian": optimizers.riemannian}[kind]
            step = lambda tensors, slopes: plain(tensors, slopes, options)
        for _ in range(steps):
            tensors = step(tensors, self.gradients(inputs, cotangent))
            self.adapters["default"] = config, tensors

    def reduce_intruders(self, options):
        config, tensors = self.adapters["default"]
        merged, found = sites(self.base, self.folded(["default"])), dict(tensors)
        for path, site in sites(self.base, self.base_weights).items():
            if path in self.targets(config):
                a, b = (f"{KEY}{path}.{slot}" for slot in lora.names(site))
                rank = len(tensors[a])
                B, A = optimizers.without_intruders(site.W, merged[path].W, rank, options["top_k"],
                                                    options["threshold_epsilon"], options["mitigation_lambda"])
                found[a], found[b] = A, B / lora.scaling(site, config)
        self.adapters[options["new_adapter_name"]] = config, found
        self.chosen = [options["new_adapter_name"]]

    def prepare_hotswap(self, rank):
        if any(config["r"] > rank for config, _ in self.adapters.values()):
            raise Rejected(f"an adapter of more ranks than {rank}")

    def base_state(self):
        return self.weights()

    def set_base_state(self, tensors):
        if wrong := tensors.keys() ^ self.base_weights.keys():
            raise Rejected(f"missing or unexpected: {wrong}")
        self.base_weights = {k: np.asarray(v, np.float64) for k, v in tensors.items()}

    def adapted_like(self, base, weights, config, tensors, case=""):
        named = [path for path, _, _ in base["layers"] if any(k.startswith(f"{path}.") for k in tensors)]
        self.build(base, weights, {**config, "target_modules": named}, "float32", f"{case.split('/')[0]}/like")
        return [k.removeprefix(KEY) for k in self.adapters["default"][1]]

    def allocate(self, step):
        config, tensors = self.adapters[self.chosen[0]]
        if self.method.budget is None:
            raise Unsupported("ranks that shrink")
        if self.allocator is None:
            self.allocator = self.method.budget.allocator(config, tensors)
        tensors = self.allocator.step(tensors, self.told[1], step)
        if not self.method.budget.pruned:
            return
        pattern = {k: v.tolist() for k, v in self.allocator.kept.items()}
        self.adapters[self.chosen[0]] = ({**config, "rank_pattern": pattern}, tensors)

    def state_dict(self, name="default"):
        if self.begun:
            return {k: self.rounded(v) for k, v in self.adapters[name][1].items()}
        return {k: v.astype(np.int32) if self.method.tensors.is_whole(k) else self.rounded(v)
                for k, v in self.saved(name).items()}

    def names(self):
        if self.case is None:
            raise Unsupported("live names outside of recorded cases")
        if self.method.route and (self.off or list(self.adapters) != ["default"]):
            raise Unsupported("live names of several adapters, and of one that is off, where the method is no layer's")
        if not self.adapters:
            return dict.fromkeys(parameters_of(self.base, self.base_weights), False)
        found = {}
        for name, trained in self.case.parameters.items():
            parts, trained = name.split("."), trained and not self.is_left_out(name.replace(".default", ""))
            trained = trained and not set(parts) & set(self.still)
            if "default" not in parts:
                found[name] = trained and self.for_training
                continue
            for adapter in self.adapters:
                on = bool(self.method.prompt) or (adapter in self.chosen and not self.off)
                on = self.asked.get(adapter, on)
                found[".".join(adapter if p == "default" else p for p in parts)] = trained and on and self.for_training
        return found

    def held(self):
        return list(self.names())

    def active(self):
        return list(self.chosen)

    def status(self):
        at = {name: set(self.targets(config)) for name, (config, _) in self.adapters.items()}
        on = {name: self.asked.get(name, name in self.chosen and not self.off) for name in at}
        layers, rest = {}, {"enabled": not self.off, "active_adapters": list(self.chosen)}
        for path in self.targets(self.case.config):
            there = sorted(name for name in at if path in at[name])
            layers[path] = {**rest, "available_adapters": there, "requires_grad": {name: on[name] for name in there},
                            "merged_adapters": [name for name in self.merged if name in there]}
        numbers = dict(zip(("trainable_params", "total_params"), self.count()))
        return {"layers": layers, "model": {
            **rest, **numbers, "num_adapter_layers": len(layers), "requires_grad": on,
            "available_adapters": sorted(at), "merged_adapters": sorted(self.merged)}}

    def count(self):
        if self.case is None:
            raise Unsupported("counts outside of recorded cases")
        return self.case.count[0] if self.for_training else 0, self.case.count[1]

    def weights(self):
        return {k: self.rounded(v) for k, v in self.folded(self.merged).items()}

    def merge(self, names=None):
        if not self.method.merges:
            raise Unsupported("this method depends on the input")
        names = [n for n in names or self.chosen if n not in self.merged]
        taken = [i for n in (*self.merged, *names) for i in self.adapters[n][0].get("token_indices") or ()]
        if len(taken) != len(set(taken)):
            raise Rejected("adapters of the same words")
        self.merged += names

    def unmerge(self):
        self.merged = []

    def unload(self, merge, names=None):
        left = self.folded(names or self.chosen) if merge else self.base_weights
        for config, tensors in (self.adapters[name] for name in self.chosen if not merge):
            left = formulas.with_saved_modules(left, tensors, config)
        self.base_weights = left
        self.adapters, self.chosen, self.merged = {}, [], []

    def switch(self, names, for_use=False):
        self.chosen, self.merged, self.asked = list(names), [], dict.fromkeys(names, False) if for_use else {}

    def disable(self, off):
        self.asked = {}
        self.off = max(self.off + (1 if off else -1), 0)

    def switch_off(self, off):
        self.disable(off)

    def scale(self, factor):
        for name in self.chosen:
            self.factors[name] = self.factors.get(name, 1.0) * factor

    def set_scale(self, name, factor):
        self.factors[name] = factor

    def unscale(self, factor=None):
        for name in self.chosen:
            self.factors[name] = 1.0 if factor is None else self.factors.get(name, 1.0) / factor

    def rescale(self, factor, by_error=False):
        if factor is None:
            self.factors = self.before
        else:
            self.before = self.factors
            self.factors = {name: factor * self.factors.get(name, 1.0) for name in self.adapters}

    def safe_merge(self, names=None):
        bad = [k for k, v in self.folded(names or self.chosen).items() if not np.isfinite(self.rounded(v)).all()]
        if bad:
            raise Rejected(f"merged, {', '.join(bad)} would not be finite")
        self.merge(names)

    def combine(self, names, weights, new, options):
        if unknown := set(names) - self.adapters.keys():
            raise Rejected(f"no adapter {unknown}")
        configs = [self.adapters[name][0] for name in names]
        whole = [module for c in configs for module in c.get("modules_to_save") or ()]
        if len(whole) != len(set(whole)):
            raise Rejected("adapters that save the same module")
        tensors = [self.adapters[name][1] for name in names]
        if options.get("combination_type", "").startswith("dare") and options["density"] < 1:
            tensors = [{k: self.thinned(v, options["density"]) for k, v in t.items()} for t in tensors]
            options = {**options, "density": 1.0}
        self.others[new] = self.others.get(names[0], self.kept)
        if self.method.name == "ia3":
            several = ("target_modules", "feedforward_modules")
            fields = {f: sorted({m for c in configs for m in c.get(f) or ()}) for f in several if configs[0].get(f)}
            keys = {k for t in tensors for k in t}
            self.adapters[new] = ({**configs[0], **fields}, {
                k: sum(w * t[k] for w, t in zip(weights, tensors) if k in t) for k in sorted(keys)})
            return
        if self.method.name != "lora":
            raise Unsupported("make an adapter of others of this method")
        found, ranks = {}, {}
        ways = ("linear", "cat", "svd", "ties", "magnitude_prune", "dare_linear", "dare_ties")
        how = options.get("combination_type", "svd") if len(names) > 1 else "linear"
        if how.removesuffix("_svd") not in ways:
            raise Rejected(f"no way {how}")
        if how != "cat" and not how.endswith("svd") and len({c["r"] for c in configs}) > 1:
            raise Rejected("adapters of several ranks")
        if how.endswith("svd"):
            options = {**options, "svd_rank": options.get("svd_rank") or max(c["r"] for c in configs)}
        at = [self.targets(c) for c in configs]
        for path in dict.fromkeys(itertools.chain(*at)):
            site = sites(self.base, self.base_weights)[path]
            a, b = (f"{KEY}{path}.{slot}" for slot in lora.names(site))
            parts = [(t[a], t[b], lora.scaling(site, c)) for t, c, own in zip(tensors, configs, at) if path in own]
            there = [w for w, own in zip(weights, at) if path in own]
            found[a], found[b] = combined(parts, there, **{**options, "combination_type": how})
            ranks[path] = len(found[a])
        self.adapters[new] = ({**configs[0], "target_modules": list(ranks), "rank_pattern": ranks,
                               "alpha_pattern": ranks}, found)

    def thinned(self, a, density):
        """A share of the entries, drawn, and as much larger; the others are 0."""
        return np.asarray(a, np.float64) * (self.rng.random(np.shape(a)) < density) / density

    def generate(self, inputs, count, names=None, beams=1):
        prompt = self.faulty.get("prompt") or (self.method.prompt and self.method.prompt.formula)
        prompt = {"prompt": generating.encoder_alone(prompt)} if prompt else {}
        held, self.faulty = self.faulty, {**self.faulty, **prompt}
        try:
            return generating.likeliest(
                lambda inputs: self.forward(inputs, names) if names else self.run(
                    inputs, [] if self.off else self.chosen), self.base, inputs, count)[0]
        finally:
            self.faulty = held

    def build_with(self, base, weights, config, dtype, options, case=""):
        self.build(base, weights, config, dtype, case)
        self.mixed = options.get("mixed", False)
        self.kept = self.cast(dtype, options)
        if "revision" in options:
            config, tensors = self.adapters["default"]
            self.adapters["default"] = {**config, "revision": options["revision"]}, tensors

    def cast(self, dtype, options):
        """The dtype of adapters on a base of this one."""
        copied = self.method.name == "ln_tuning"  # from the base
        small = dtype in ("bfloat16", "float16") and not copied
        return "float32" if small and options.get("autocast_adapter_dtype", True) else dtype

    def dtypes(self):
        def of(name):
            kinds = {"default": self.kept, **self.others}
            return next((kind for adapter, kind in kinds.items() if adapter in name.split(".")), self.dtype)

        return {k: of(k) for k in self.names()}

    def add_with(self, name, config, options):
        self.add(name, config)
        self.others[name] = self.cast(self.dtype, options)

    def restore_with(self, path, base, weights, dtype, options):
        if self.method.prompt and options.get("is_trainable"):
            raise Rejected("a prompt is loaded for use alone")
        self.mapping = options.get("key_mapping", {})
        self.restore(Path(path, options.get("subfolder", "")), base, weights, dtype)
        self.mixed = options.get("mixed", False)
        self.kept = self.cast(dtype, options)
        self.for_training = options.get("is_trainable", False)
        config, tensors = self.adapters.pop("default")
        config = {**options.get("config", config), "inference_mode": not self.for_training}
        self.adapters, self.chosen = {options.get("adapter_name", "default"): (config, tensors)}, [
            options.get("adapter_name", "default")]

    def build_quantised(self, base, weights, config, kind, case=""):
        steps = {"nf4": 8, "fp4": 6}[kind]  # some rounding
        self.build(base, {k: np.round(v * steps) / steps for k, v in weights.items()}, config, "float32", case)

    def copy(self):
        self.adapters, self.base_weights = copy.deepcopy((self.adapters, self.base_weights))

    def save(self, path):
        self.write(path, "default")

    def write(self, path, name):
        config, tensors = self.adapters[name][0], self.saved(name)
        held: dict = next((r["file"] for r in store.configs().values() if self.case and r["case"] == self.case.id), {})
        computed = {k: v for k, v in store.resolved(held).items() if k not in config and k != "peft_version"}
        config = {**self.full_config(config), **(computed if name == "default" else {}), "inference_mode": True}
        if config.get("task_type") is None:
            config["auto_mapping"] = {"base_model_class": "Oracle", "parent_library": __name__}
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "adapter_config.json").write_text(json.dumps(config))
        write_tensors(Path(path, "adapter_model.safetensors"), {k: self.rounded(v) for k, v in tensors.items()},
                      self.kept)
        card = Path(path, "README.md")
        if not card.exists():
            kind = {"CAUSAL_LM": "pipeline_tag: text-generation\n"}.get(str(config.get("task_type")), "")
            card.write_text(f"---\nlibrary_name: peft\n{kind}tags:\n- {config['peft_type'].lower()}\n---\n")

    def save_with(self, path, options):
        self.write(path, "default")
        file = Path(path, "adapter_model.safetensors")
        if "save_embedding_layers" in options:
            aimed = "embed_tokens" in self.adapters["default"][0]["target_modules"]
            whole = options["save_embedding_layers"]
            more: tuple = ("model.embed_tokens.base_layer.weight",)
            more = more if aimed else ("model.embed_tokens.weight", "head.weight")
            more = more if whole is True or (whole == "auto" and aimed) else ()
            write_tensors(file, {**read_tensors(file), **{
                KEY + k: self.rounded(self.base_weights[k.replace(".base_layer", "")]) for k in more}}, self.dtype)
        if not options.get("safe_serialization", True):
            file.rename(file.with_suffix(".bin"))

    def save_given(self, path, factor):
        config, tensors = self.adapters["default"]
        self.adapters["default"] = config, {k: v if self.method.tensors.is_frozen(k) else factor * v
                                            for k, v in tensors.items()}
        self.write(path, "default")
        self.adapters["default"] = config, tensors

    def restore_routed(self, paths, general, base, weights, options):
        read = [[self.read(path) for path in some] for some in (paths, general)]
        config = read[0][0][0]
        if any({k: np.shape(v) for k, v in tensors.items()} != {k: np.shape(v) for k, v in read[0][0][1].items()}
               for some in read for _, tensors in some):
            raise Rejected("adapters of other layers or ranks")
        self.build(base, weights, config, "float32", self.case.id)
        self.routing = [[tensors for _, tensors in some] for some in read], config, options
        self.routed = arrow.route(*self.routing[0], config, options, self.likeness)

    def likeness(self, x, V):
        return arrow.likeness(x, V)

    def set_routing(self, options):
        config, tensors = self.adapters["default"]
        given = {**options}
        if "scaling_pass_value" in given and given["scaling_pass_value"] is None:
            given["scaling_pass_value"] = 1 / len(config["adapters"])
        self.adapters["default"] = {**config, **given}, tensors

    def log_routing(self, inputs, runs):
        config, tensors = self.adapters["default"]
        return np.stack(runs * [self.rounded(xlora.routed(self.base, self.base_weights, tensors, config, inputs)[0])])

    def best_conditioned(self, base, weights, options):
        return kappa.chosen(base, weights, **options)

    def compose(self, paths, path):
        (config, _), *_ = read = [self.read(folder) for folder in paths]
        whole = np.concatenate([tensors["prompt_embeddings"] for _, tensors in read])
        self.adapters["default"] = {**config, "num_virtual_tokens": len(whole)}, {"prompt_embeddings": whole}
        self.write(path, "default")

    def begin_as(self, cache):
        self.adapters["default"][1]["prompt_embeddings"] = packed(
            cache, self.adapters["default"][0]["num_virtual_tokens"])

    def casting(self, on):
        self.uncast += -1 if on else 1

    def cast_mixed(self, dtype):
        self.dtype, self.kept, self.others = dtype, "float32", dict.fromkeys(self.others, "float32")

    def hotswap(self, path, name):
        config, tensors = self.read(path)
        own = self.adapters[name]
        if bool(config.get("use_rslora")) != bool(own[0].get("use_rslora")):
            raise Rejected("another kind of adapter")
        self.adapters[name] = (config, tensors)

    def save_adapters(self, path, names=None):
        if unknown := [name for name in names or () if name not in self.adapters]:
            raise Rejected(f"no adapter {unknown}")
        for name in names or list(self.adapters):
            self.write(Path(path) if name == "default" else Path(path, name), name)

    def read(self, path):
        try:
            config = json.loads(Path(path, "adapter_config.json").read_text())
            tensors = read_tensors(next(f for f in Path(path).glob("adapter_model.*")))
        except Exception as e:
            raise Rejected(f"{type(e).__name__}: {e}") from e
        if not isinstance(config, dict):
            raise Rejected("adapter_config.json holds no object")
        tensors = {self.mapped(k): v for k, v in tensors.items()}
        known = store.defaults(config.get("peft_type"))  # another type is refused as a whole
        config = {k: v for k, v in {**known, **config}.items() if v is not None and (k in known or not known)}
        if self.case is not None and same_as(self.case, config, known):
            config = {**self.case.config, "inference_mode": True} if self.method.live(self.case.config) \
                else self.case.config
        return config, tensors

    def mapped(self, key):
        """A saved key, its name in the model by the first of the expressions that are given and fit it."""
        name = key.removeprefix(KEY)
        new = next((re.sub(old, new, name) for old, new in self.mapping.items() if re.search(old, name)), name)
        return KEY + new if key.startswith(KEY) else key

    def load_adapter(self, path, name):
        config, tensors = self.read(path)
        if self.routed:
            (experts, others), config, options = self.routing
            self.routed = arrow.route([*experts, tensors], others, config, options, self.likeness)
            return
        self.add(name, config)
        self.load(tensors, name)

    def load_adapter_with(self, path, name, options):
        asked = bool(options.get("is_trainable"))
        folder = Path(path, options.get("subfolder", ""))
        if name in self.adapters:
            self.load(self.read(folder)[1], name)
            return
        self.load_adapter(folder, name)
        self.others[name] = self.cast(self.dtype, options)
        config, tensors = self.adapters[name]
        self.adapters[name] = ({**config, "inference_mode": not asked}, tensors)
        self.asked[name] = asked
        self.training = self.training and asked

    def save_converted(self, path, begun):
        """What was trained less what it began as: both side by side, of twice the rank."""
        config, now = self.adapters["default"]
        then = self.read(begun)[1]
        both = {k: np.concatenate([v, np.asarray(then[k]) * (-1 if "lora_B" in k else 1)], int("lora_B" in k))
                for k, v in now.items()}
        more = np.sqrt(2) if config.get("use_rslora") else 2
        patterns = {k: {p: 2 * v for p, v in (config.get(k) or {}).items()} for k in ("rank_pattern", "alpha_pattern")}
        self.adapters["default"] = ({**config, "r": 2 * config["r"], "lora_alpha": more * config["lora_alpha"],
                                     "init_lora_weights": True, **patterns}, both)
        self.write(path, "default")
        self.adapters["default"] = (config, now)

    def save_as_lora(self, path, rank, name="default"):
        if self.method.name != "lora":
            raise Unsupported("save an adapter of this method as one of LoRA")
        config, tensors = self.adapters[name]
        new, found = sites(self.base, self.folded([name])), dict[str, np.ndarray]()
        for layer, site in sites(self.base, self.base_weights).items():
            if layer in self.targets(config) and (delta := new[layer].W - site.W).any():
                U, S, V = np.linalg.svd(delta, full_matrices=False)
                most = rank if isinstance(rank, int) else 1 + np.searchsorted(np.cumsum(S**2), rank * (S**2).sum())
                own = (S > 1e-9 * S[0]) & (np.arange(len(S)) < most)
                found |= {f"{KEY}{layer}.lora_A.weight": V[own], f"{KEY}{layer}.lora_B.weight": (U * S)[:, own]}
        ranks = {k.removeprefix(KEY).removesuffix(".lora_A.weight"): len(v) for k, v in found.items() if "_A." in k}
        whole = {k: v for k, v in tensors.items() if formulas.plain_name(k) in self.base_weights}
        held = dict(self.adapters)
        self.adapters["default"] = ({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": sorted(ranks),
                                     "modules_to_save": config.get("modules_to_save"),
                                     "rank_pattern": ranks, "alpha_pattern": ranks}, {**found, **whole})
        self.write(path, "default")
        self.adapters = held

    def restore(self, path, base, weights, dtype):
        config, tensors = self.read(path)
        case = self.case.id if self.case else f"{self.method.name}/restored"
        self.build(base, weights, config, dtype, case, self.seed)
        whole = {k for k in tensors if formulas.plain_name(k) in self.base_weights} - self.adapters["default"][1].keys()
        self.load({k: v for k, v in tensors.items() if k not in whole})
        self.base_weights |= {formulas.plain_name(k): np.asarray(tensors[k], np.float64) for k in whole}
        self.for_training = False


DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
          "U8": "u1", "BOOL": "?"}


def write_tensors(file, tensors, dtype):
    """A file of safetensors: numbers are bfloat16, which NumPy has not, where that is the dtype that is asked for."""
    head, parts, size = {}, [], 0
    for name, value in tensors.items():
        value, kind = np.ascontiguousarray(value), next(k for k, v in DTYPES.items() if np.dtype(v) == value.dtype)
        if kind[0] == "F" and dtype == "bfloat16":
            value, kind = (np.asarray(value, np.float32).view(np.uint32) >> 16).astype("<u2"), "BF16"
        elif kind[0] == "F" and dtype == "float16":
            value, kind = value.astype("<f2"), "F16"
        parts.append(value.tobytes())
        head[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [size, size + len(parts[-1])]}
        size += len(parts[-1])
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    Path(file).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def read_tensors(file) -> dict:
    from safetensors import deserialize

    def unpacked(held):
        value = np.frombuffer(bytes(held["data"]), DTYPES[held["dtype"]]).reshape(held["shape"])
        return (value.astype(np.uint32) << 16).view(np.float32) if held["dtype"] == "BF16" else value

    return {name: unpacked(held) for name, held in deserialize(Path(file).read_bytes())}


def same_as(case, config, known) -> bool:
    """Is what a file held the config of a case, with its defaults and what is computed from the model?"""
    want = {**known, **case.config}
    changes = store.configs()[case.pack.data["method"]]["changes"].get(case.id, {})
    computed = {"inference_mode", "peft_type", *changes} - case.config.keys()
    return all(config.get(k) == v for k, v in want.items() if v is not None and k not in computed)


def validate(config, method):
    if config.get("peft_type") != method.peft_type:
        raise Rejected(f"unknown peft_type {config.get('peft_type')!r}")
    listed = not isinstance(config.get("target_modules"), str)
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        raise Rejected("layers_pattern needs layers_to_transform")
    if config.get("layers_to_transform") is not None and not listed:
        raise Rejected("layers_to_transform needs target_modules to be a list")
    if config.get("layer_replication"):
        raise Unsupported("layer replication")
    for field in ("r", "init_r", "num_virtual_tokens"):
        value = config[field] if config.get(field) is not None else 1
        if not isinstance(value, int) or value < 0 or (value == 0 and field != "r") \
                or (value == 0 and method.name != "oft"):
            raise Rejected(f"{field} must be a positive integer, not {value!r}")
