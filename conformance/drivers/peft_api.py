"""Any importable module that offers PEFT's public API: peft itself, minipeft, a fork."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from .. import models
from ..driver import Driver, Rejected, Unsupported
from ..reference.methods import methods

# What a library raises when it means "I will not take this". NotImplementedError with a message says that it does not
# offer this; any other exception is a crash.
MEANT = (ValueError, TypeError, KeyError, RuntimeError, OSError)
UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")  # as Python words it
# as PEFT words it: a release knows its models, and its ways to begin
NOT_OFFERED = re.compile(r"Unsupported model type for adaption prompt|"
                         r"Unknown initialization init_lora_weights='(eva|corda|lora_ga|mica|olora|orthogonal)'")


CLASSES = {"eva_config": "EvaConfig", "corda_config": "CordaConfig", "lora_ga_config": "LoraGAConfig"}
ALL_TYPES = {m.peft_type for m in methods().values()}


def to_torch(array, dtype):
    t = torch.from_numpy(np.array(array))
    return t.to(dtype) if t.is_floating_point() else t


def to_numpy(tensor):
    t = tensor.detach().cpu()
    return (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).clone().numpy()


def version_of(module) -> str:
    try:
        return getattr(module, "__version__", None) or importlib.metadata.version(module.__name__)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def rejecting():
    """Turn errors that were meant into `Rejected`, with the library's own words."""
    try:
        yield
    except Unsupported:
        raise
    except NotImplementedError as e:
        if not str(e):
            raise
        if isinstance(e, (ValueError, TypeError, KeyError)):  # what is offered, and refuses this input
            raise Rejected(f"{type(e).__name__}: {e}") from e
        raise Unsupported(f"{type(e).__name__}: {e}") from e
    except MEANT as e:
        if isinstance(e.__cause__, ModuleNotFoundError):
            raise Unsupported(f"no {e.__cause__.name}") from e
        if NOT_OFFERED.search(str(e)):
            raise Unsupported(f"{type(e).__name__}: {e}") from e
        raise Rejected(f"{type(e).__name__}: {e}") from e
    except Exception as e:
        if type(e).__module__.startswith("safetensors") or type(e).__name__ == "SafetensorError":
            raise Rejected(f"{type(e).__name__}: {e}") from e
        raise


def unwrap(module):
    """The frozen layer under whatever stands in its place."""
    while True:
        if hasattr(module, "base_layer"):
            module = module.base_layer
        elif hasattr(module, "original_module"):
            module = module.original_module
        elif hasattr(module, "adaption_prompt"):
            module = module.model
        else:
            return module


class PeftApi(Driver):
    def __init__(self, module: str = "peft"):
        warnings.simplefilter("ignore")
        self.peft = importlib.import_module(module)
        self.known = {getattr(k, "value", k) for k in getattr(self.peft, "PeftType", ())}
        self.model: Any = None
        self.begin()

    def begin(self):
        """Another model: enabled, in evaluation mode."""
        self.training, self.disabled, self.mixes = False, [], False
        self.rescaled: Any = None
        self.uncast: list = []

    def info(self):
        return {"name": self.peft.__name__, "version": version_of(self.peft),
                "dtypes": ["float64", "float32", "bfloat16", "float16"], "torch": torch.__version__}

    def config(self, config):
        config = copy.deepcopy(config)
        kind = config.get("peft_type")
        if self.known and kind not in self.known:
            raise Unsupported(f"no PeftType {kind}") if kind in ALL_TYPES else Rejected(f"unknown peft_type {kind!r}")
        for nested, name in CLASSES.items():  # which older releases do not make of a dictionary
            if isinstance(config.get(nested), dict):
                with contextlib.suppress(Unsupported):
                    config[nested] = self.found(name)(**config[nested])
        try:
            return self.peft.get_peft_config(config)
        except TypeError as e:
            field = UNKNOWN.search(str(e))
            if field and field[1] in config:  # the suite's configs hold fields of the reference alone
                raise Unsupported(f"no field {field[1]} in the configuration of {kind}") from e
            raise

    def base(self, base, weights, dtype):
        self.dtype, self.argument, self.description = models.DTYPES[dtype], base.get("states"), base
        if base.get("model") == "skeleton":
            with torch.device("meta"):
                return models.make(base).eval()
        try:
            net = models.make(base).to(self.dtype).eval()
        except ModuleNotFoundError as e:
            raise Unsupported(f"its base model needs {e.name}") from e
        self.base_names = list(weights)
        net.load_state_dict({k: to_torch(v, self.dtype) for k, v in weights.items()})
        return net

    def build(self, base, weights, config, dtype, case="", seed=0):
        self.begin()
        self.model = self.base(base, weights, dtype)
        models.seed(seed)
        if config is None:
            return
        with rejecting():
            self.model = self.peft.get_peft_model(self.model, self.config(config))
        self.model.to(self.dtype).eval()

    def full_config(self, config):
        with rejecting():
            return self.written(self.config(config))

    def found(self, function):
        """A function or class, wherever a release or a library keeps it."""
        for place in ("", ".helpers", ".utils", ".optimizers", ".compat.optimizers", ".compat.intruders",
                      ".tuners.lora.intruders", ".tuners.lora", ".tuners.lora.config", ".tuners.lora.corda",
                      ".methods.lora.corda", ".utils.hotswap", ".compat.hotswap", ".tuners.cartridge.utils",
                      ".methods.prompts.prefixes"):
            with contextlib.suppress(ModuleNotFoundError, AttributeError):
                return getattr(importlib.import_module(self.peft.__name__ + place), function)
        raise Unsupported(f"no {function}")

    def build_from_data(self, base, weights, config, dtype, data, case="", seed=0, batches=1):
        self.begin()
        net = self.model = self.base(base, weights, dtype)
        parts = [dict(zip(data, part)) for part in zip(*(np.split(np.asarray(v), batches) for v in data.values()))]
        given = [self.kwargs({k: v for k, v in part.items() if k != "cotangent"}) for part in parts]

        def step():
            for (first, more), part in zip(given, parts):
                net.zero_grad()
                (self.run(first, more) * to_torch(part["cotangent"], self.dtype)).sum().backward()

        def look():
            with torch.no_grad():
                for first, more in given:
                    self.run(first, more)

        begins = config["init_lora_weights"]
        with rejecting():
            made = self.config(config)
            if begins == "corda":
                self.found("preprocess_corda")(net, made, run_model=look)
            elif begins == "lora_ga":
                self.found("preprocess_loraga")(net, made, step)
            elif begins != "eva":
                raise Unsupported(f"begin by data as {begins}")
            models.seed(seed)
            self.model = self.peft.get_peft_model(net, made)
            if begins == "eva":
                more = given[0][1]
                self.found("initialize_lora_eva_weights")(
                    self.model, [first for first, _ in given], forward_fn=lambda model, x: model(x, **more),
                    prepare_model_inputs_fn=None, show_progress_bar=False,
                    prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).flatten(0, -2))
        self.model.to(self.dtype).eval()

    def written(self, config):
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return json.loads(Path(folder, "adapter_config.json").read_text())

    def read_config(self, path, given):
        with rejecting():
            return self.written(self.peft.PeftConfig.from_pretrained(path, **given))

    def config_of(self, name=None):
        return self.written(self.model.active_peft_config if name is None else self.model.peft_config[name])

    def add(self, name, config):
        with rejecting():
            self.model.add_adapter(name, self.config(config))
        self.model.to(self.dtype).train(self.training)

    def delete(self, name):
        try:
            with rejecting():
                self.model.delete_adapter(name)
        except AttributeError as e:  # where the method has no such thing, PEFT asks the base model for it
            base = self.model.get_base_model()  # of early releases' Poly, its tuner
            asked = {type(module).__name__ for module in (base, getattr(base, "model", base))}
            if str(e) not in {f"'{name}' object has no attribute 'delete_adapter'" for name in asked}:
                raise
            raise Unsupported(f"this method's adapters cannot be deleted: {e}") from e

    def tensors(self, tensors):
        return {k: to_torch(v, self.dtype) for k, v in tensors.items()}

    def saved(self, name="default"):
        """What a checkpoint holds, as it is now."""
        return self.peft.get_peft_model_state_dict(self.model, adapter_name=name)

    def load(self, tensors, name="default"):
        tensors = self.tensors(tensors)
        with rejecting():
            self.peft.set_peft_model_state_dict(self.model, tensors, adapter_name=name)

    def kwargs(self, inputs):
        x = {k: to_torch(v, self.dtype) for k, v in inputs.items()}
        first = x.pop("x") if "x" in x else x.pop("input_ids", None)
        return first, x

    def run(self, first, more):
        model = self.model
        if not hasattr(model, "peft_config"):
            more = {k: v for k, v in more.items() if k not in ("alora_offsets", "task_ids")}  # for adapters alone
        elif "task_ids" in more and type(model) is self.peft.PeftModel:
            model = model.base_model  # PEFT's task-less PeftModel.forward does not pass them on, its tuner does
        given = {} if first is None else {self.argument: first}  # words may be embedded already
        out = model(**given, **more) if self.argument or first is None else model(first, **more)
        return models.answer(out, "labels" in more)

    def forward(self, inputs, adapter_names=None):
        first, more = self.kwargs(inputs)
        if adapter_names is not None:
            more["adapter_names"] = ["__base__" if n is None else n for n in adapter_names]
            try:
                with torch.no_grad():
                    answer = to_numpy(self.run(first, more))
            except (TypeError, ValueError) as e:
                if self.mixes:  # such batches are known, and this one is refused
                    raise Rejected(f"{type(e).__name__}: {e}") from e
                if "adapter_names" not in str(e):
                    raise
                raise Unsupported(f"mixed batches: {e}") from e  # it does not know the argument, or refuses it
            self.mixes = True
            return answer
        with torch.no_grad(), rejecting():
            return to_numpy(self.run(first, more))

    def assign(self, tensors):
        live = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in tensors.items():
                live[name].copy_(to_torch(value, self.dtype))

    def backward(self, inputs, cotangent):
        first, more = self.kwargs(inputs)
        self.model.zero_grad()
        if first.is_floating_point():
            first.requires_grad_(True)
        (self.run(first, more) * to_torch(cotangent, self.dtype)).sum().backward()
        return first

    def live_gradients(self, inputs, cotangent):
        first = self.backward(inputs, cotangent)
        found = {"input": to_numpy(first.grad)} if first.is_floating_point() else {}
        return {**found, **{k: to_numpy(torch.zeros_like(p) if p.grad is None else p.grad)
                            for k, p in self.model.named_parameters() if p.requires_grad}}

    def gradients(self, inputs, cotangent):
        first = self.backward(inputs, cotangent)
        found = {"input": to_numpy(first.grad)} if first.is_floating_point() else {}
        return {**found, **self.saved_view(lambda p: torch.zeros_like(p) if p.grad is None else p.grad.clone())}

    def saved_view(self, of):
        """The saved keys of the trainable parameters, with `of(parameter)` in place of the values and 0 elsewhere."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        kept = [p.data for p in params]
        made = [of(p) for p in params]
        try:
            for p in params:
                p.data = torch.full_like(p, float("nan"))
            trained = {k: torch.isnan(v) for k, v in self.saved().items()}
            for p, new in zip(params, made):
                p.data = new
            state = self.saved()
            return {k: to_numpy(v * trained[k]) for k, v in state.items() if trained[k].any()}
        finally:
            for p, old in zip(params, kept):
                p.data = old

    def state_dict(self, name="default"):
        return {k: to_numpy(v) for k, v in self.saved(name).items()}

    def names(self):
        return {k: p.requires_grad for k, p in self.model.named_parameters()}

    def held(self):
        return [name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())]

    def count(self):
        return tuple(self.model.get_nb_trainable_parameters())

    def weights(self):
        root = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        found = {}
        for name in self.base_names:
            module = root
            *path, last = name.split(".")
            for part in path:
                module = getattr(unwrap(module), part)
            found[name] = to_numpy(getattr(unwrap(module), last))
        return found

    def merge(self, names=None):
        with rejecting():
            self.model.merge_adapter(names)

    def unmerge(self):
        with rejecting():
            self.model.unmerge_adapter()

    def unload(self, merge, names=None):
        named = {"adapter_names": names} if names else {}
        with rejecting():
            self.model = self.model.merge_and_unload(**named) if merge else self.model.unload()

    def switch(self, names, for_use=False):
        with rejecting():
            if for_use and "inference_mode" not in inspect.signature(self.model.set_adapter).parameters:
                raise Unsupported("set_adapter takes no inference_mode")
            if len(names) == 1:
                self.model.set_adapter(names[0], **({"inference_mode": True} if for_use else {}))
            else:
                self.model.base_model.set_adapter(list(names))
        self.model.train(self.training)

    def disable(self, off):
        if off:
            self.disabled.append(self.model.disable_adapter())
            self.disabled[-1].__enter__()
        elif self.disabled:
            self.disabled.pop().__exit__(None, None, None)

    def switch_off(self, off):
        name = f"{'disable' if off else 'enable'}_adapter_layers"
        if not hasattr(self.model.base_model, name):
            raise Unsupported(f"no {name}")
        getattr(self.model.base_model, name)()

    def active(self):
        return list(self.model.active_adapters)

    def status(self):
        if not hasattr(self.model, "get_model_status"):
            raise Unsupported("no get_model_status")
        layers, model = self.model.get_layer_status(), dataclasses.asdict(self.model.get_model_status())
        found = {row.name.removeprefix("model."): dataclasses.asdict(row) for row in layers}
        return {"layers": found, "model": model}

    def train(self, on):
        self.training = on
        self.model.train(on)

    def in_training(self):
        return self.model.training

    def require_grad(self, names, on):
        owner = self.model if hasattr(type(self.model), "set_requires_grad") else self.model.base_model
        if not hasattr(owner, "set_requires_grad"):
            raise Unsupported("no set_requires_grad")
        owner.set_requires_grad(names, requires_grad=on)

    def step(self, inputs, cotangent, rate):
        self.backward(inputs, cotangent)
        torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=rate).step()

    def optimise(self, kind, options, inputs, cotangent, steps):
        create = self.found(f"create_{kind}_optimizer")
        with rejecting():
            optimizer = create(self.model, *([] if kind == "lorafa" else [torch.optim.SGD]), **options)
        for _ in range(steps):
            self.backward(inputs, cotangent)
            optimizer.step()

    def reduce_intruders(self, options):
        with rejecting():
            self.found("reduce_intruder_dimension")(self.model, **options, logging_sink=None)
        self.model.eval()

    def prepare_hotswap(self, rank):
        with rejecting():
            self.found("prepare_model_for_compiled_hotswap")(self.model, target_rank=rank)

    def base_state(self):
        return {k: to_numpy(v) for k, v in self.found("get_base_model_state_dict")(self.model).items()}

    def set_base_state(self, tensors):
        with rejecting():
            self.found("set_base_model_state_dict")(self.model, self.tensors(tensors))

    def auto(self, kind, config, words=0):
        try:
            base, ids = models.of_transformers(kind)
        except ModuleNotFoundError as e:
            raise Unsupported(f"no {e.name}") from e
        load = getattr(self.peft, f"AutoPeftModel{kind}", None)
        if load is None:
            raise Unsupported(f"no AutoPeftModel{kind}")
        more = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}

        def run(model):
            with torch.no_grad():
                return to_numpy(models.answer(model.eval()(input_ids=ids, **more)))

        with tempfile.TemporaryDirectory() as folder, rejecting():
            base.save_pretrained(folder)
            model = self.peft.get_peft_model(type(base).from_pretrained(folder), self.config(config))
            models.seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(0, 0.2)
            before, adapter = run(model), str(Path(folder, "adapter"))
            model.save_pretrained(adapter)
            if words:
                models.tokenizer(words).save_pretrained(adapter)
            loaded = [load.from_pretrained(adapter, is_trainable=on) for on in (False, True)]
            trained, trainable = ([n for n, p in m.named_parameters() if p.requires_grad] for m in loaded)
            return {"task": type(loaded[0]).__name__, "trained": trained, "trainable": trainable,
                    "rows": len(loaded[0].get_base_model().get_input_embeddings().weight),
                    "before": before.tolist(), "after": run(loaded[0]).tolist()}

    def adapted_like(self, base, weights, config, tensors, case=""):
        net = self.base(base, weights, "float32")
        inject = self.peft.inject_adapter_in_model
        if "state_dict" not in inspect.signature(inject).parameters:
            raise Unsupported("inject_adapter_in_model takes no state_dict")
        with rejecting():
            self.model = inject(self.config(config), net, state_dict=self.tensors(tensors))
        return list(self.saved())

    def allocate(self, step):
        self.model.base_model.update_and_allocate(step)

    def scale(self, factor):
        layers = [m for m in self.model.modules() if hasattr(m, "scale_layer")]
        if not layers:
            raise Unsupported("layers have no scale_layer")
        for layer in layers:
            layer.scale_layer(factor)

    def penalty(self):
        terms = [getattr(self.model.base_model, n)() for n in ("_get_kasa_loss", "_get_monteclora_loss")
                 if hasattr(self.model.base_model, n)]
        if not terms:
            raise Unsupported("no further terms of the loss")
        return float(sum(terms))

    def copy(self):
        self.model = copy.deepcopy(self.model)

    def save(self, path):
        with rejecting():
            self.model.save_pretrained(path)

    def save_with(self, path, options):
        with rejecting():
            self.model.save_pretrained(path, **options)

    def save_given(self, path, factor):
        trained = {p.data_ptr() for p in self.model.parameters() if p.requires_grad}  # which may have several names
        given = {k: factor * v if v.data_ptr() in trained else v for k, v in self.model.state_dict().items()}
        with rejecting():
            self.model.save_pretrained(path, state_dict=given)

    def hotswap(self, path, name):
        with rejecting():
            self.found("hotswap_adapter")(self.model, path, name)

    def add_with(self, name, config, options):
        if not options.keys() <= inspect.signature(self.model.add_adapter).parameters.keys():
            raise Unsupported(f"add_adapter takes no {', '.join(options)}")
        with rejecting():
            self.model.add_adapter(name, self.config(config), **options)
        self.model.train(self.training)

    def save_adapters(self, path, names=None):
        with rejecting():
            self.model.save_pretrained(path, selected_adapters=names)

    def load_adapter(self, path, name):
        with rejecting():
            self.model.load_adapter(path, name)
        self.model.to(self.dtype).train(self.training)

    def load_adapter_with(self, path, name, options):
        with rejecting():
            told = self.model.load_adapter(path, name, **options)
        if told is not None:
            return {"missing": list(told.missing_keys), "unexpected": list(told.unexpected_keys)}

    def save_converted(self, path, begun):
        if "path_initial_model_for_weight_conversion" not in inspect.getsource(self.peft.PeftModel.save_pretrained):
            raise Unsupported("save_pretrained takes no path_initial_model_for_weight_conversion")
        with rejecting():
            self.model.save_pretrained(path, path_initial_model_for_weight_conversion=begun)

    def save_as_lora(self, path, rank, name="default"):
        if not hasattr(self.peft, "save_as_lora"):
            raise Unsupported("no save_as_lora")
        with rejecting():
            self.peft.save_as_lora(path, self.model, rank=rank, adapter_name=name)

    def restore(self, path, base, weights, dtype):
        self.begin()
        net = self.base(base, weights, dtype)
        with rejecting():
            self.model = self.peft.PeftModel.from_pretrained(net, path)
        self.model.to(self.dtype).eval()

    def build_with(self, base, weights, config, dtype, options, case=""):
        self.begin()
        net = self.base(base, weights, dtype)
        with rejecting():
            self.model = self.peft.get_peft_model(net, self.config(config), **options)
        self.model.eval()

    def restore_with(self, path, base, weights, dtype, options):
        self.begin()
        net = self.base(base, weights, dtype)
        with rejecting():
            if "config" in options:
                options = {**options, "config": self.config(options["config"])}
            options = dict(options)
            kind = self.peft.PeftMixedModel if options.pop("mixed", False) else self.peft.PeftModel
            self.model = kind.from_pretrained(net, path, **options)
        self.model.eval()

    def restore_routed(self, paths, general, base, weights, options):
        arrow, create = self.found("ArrowConfig"), self.found("create_arrow_model")
        self.begin()
        net = self.base(base, weights, "float32")
        with rejecting():
            self.model = create(net, paths, arrow(**options), general_adapter_paths=general or None)
        self.model.eval()

    def set_routing(self, options):
        setters = {"top_k_lora": "set_topk_lora", "global_scaling_weight": "set_global_scaling_weight",
                   "scaling_pass_value": "set_scaling_pass_value"}
        for field, value in options.items():
            if not hasattr(self.model, setters[field]):
                raise Unsupported(f"no {setters[field]}")
            getattr(self.model, setters[field])(value)

    def log_routing(self, inputs, runs):
        if not hasattr(self.model, "enable_scalings_logging"):
            raise Unsupported("no log of scalings")
        self.forward(inputs)
        self.model.enable_scalings_logging()
        for _ in range(runs):
            self.forward(inputs)
        self.model.disable_scalings_logging()
        self.forward(inputs)
        log = self.model.get_scalings_log()
        self.model.clear_scalings_log()
        if self.model.get_scalings_log():
            raise RuntimeError("the log is not empty when it was cleared")
        return np.stack([to_numpy(each) for each in log])

    def best_conditioned(self, base, weights, options):
        find = self.found("find_kappa_target_modules")
        with rejecting():
            return find(self.base(base, weights, "float32"), show_progress=False, **options)

    def compose(self, paths, path):
        with rejecting():
            self.found("compose_cartridge_adapters")(paths, output_path=path)

    def begin_as(self, cache):
        pairs = [tuple(to_torch(cache[f"{i}.{part}"], self.dtype) for part in ("keys", "values"))
                 for i in range(len(cache) // 2)]
        with rejecting():
            self.found("initialize_kv_prefix_from_past_key_values")(self.model, past_key_values=pairs)

    def casting(self, on):
        if on:
            self.uncast.pop().__exit__(None, None, None)
            return
        self.uncast.append(self.found("disable_input_dtype_casting")(self.model))
        self.uncast[-1].__enter__()

    def cast_mixed(self, dtype):
        self.found("cast_mixed_precision_params")(self.model, models.DTYPES[dtype])

    def dtypes(self):
        return {k: str(p.dtype).removeprefix("torch.") for k, p in self.model.named_parameters()}

    def safe_merge(self, names=None):
        if "safe_merge" not in inspect.signature(self.model.merge_adapter).parameters:
            raise Unsupported("merge_adapter takes no safe_merge")
        with rejecting():
            self.model.merge_adapter(names, safe_merge=True)

    def layers_with(self, method):
        found = [m for m in self.model.modules() if hasattr(m, method)]
        if not found:
            raise Unsupported(f"layers have no {method}")
        return found

    def set_scale(self, name, factor):
        for layer in self.layers_with("set_scale"):
            layer.set_scale(name, factor)

    def unscale(self, factor=None):
        for layer in self.layers_with("unscale_layer"):
            layer.unscale_layer(factor)

    def rescale(self, factor, by_error=False):
        if factor is None:
            error = RuntimeError("what was done meanwhile failed")
            ends = (type(error), error, None) if by_error else (None, None, None)
            with contextlib.suppress(RuntimeError):
                self.rescaled.__exit__(*ends)
            return
        self.rescaled = self.found("rescale_adapter_scale")(self.model, factor)
        with rejecting():
            self.rescaled.__enter__()

    def combine(self, names, weights, new, options):
        if not hasattr(self.model, "add_weighted_adapter"):
            raise Unsupported("no add_weighted_adapter")
        with rejecting():
            self.model.add_weighted_adapter(names, weights, new, **options)
        self.model.eval()

    def generate(self, inputs, count, names=None, beams=1):
        first, more = self.kwargs(inputs)
        if names is not None:
            more["adapter_names"] = ["__base__" if n is None else n for n in names]
        if beams > 1:
            more["num_beams"] = beams
        with rejecting():
            return to_numpy(self.model.generate(input_ids=first, max_new_tokens=count, **more))

    def build_quantised(self, base, weights, config, kind, case=""):
        try:
            import bitsandbytes as bnb
        except ImportError as e:
            raise Unsupported(f"no bitsandbytes: {e}") from e
        self.begin()
        net = self.base(base, weights, "float32")
        for name, layer in list(net.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                        compute_dtype=torch.float32, quant_type=kind)
                new.load_state_dict(layer.state_dict())
                net.set_submodule(name, new.to("cpu"))
        net.is_loaded_in_4bit = True  # as transformers says it, and as PEFT asks
        self.model = net
        if config is not None:
            try:
                with rejecting():
                    self.model = self.peft.get_peft_model(net, self.config(config))
            except Rejected as e:
                raise Unsupported(f"this method on layers in 4 bits: {e}") from e
        self.model.train()  # in evaluation mode bitsandbytes computes in bfloat16 on some processors
