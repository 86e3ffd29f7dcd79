"""A model with adapters in it, and what can be done with them: the `base_model` of a PeftModel."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import registry
from ..core.adapter import ADAPTERS, Adapter, adapter_class, method_class
from ..core.bases import exact, lasting
from ..core.boxes import BufferDict, Slots
from ..core.config import CONFIGS, PeftConfig, PeftType
from ..core.errors import AdapterNameError, BatchError, MergeError, PeftWarning, UnsupportedFeatureError, sized
from ..core.layer import BASE, Context, Layer, adapted, layers
from ..core.offload import HOOKS, check_biases
from ..core.plan import check_adapter_name, model_config
from ..core.state import Entry, incoming
from ..core.walk import walk
from . import tying
from .checkpoint import entries_of_biases
from .plan import ModelPlan
from .prompt import cached_tokens
from .wrappers import ModulesToSaveWrapper, TrainableTokensWrapper

TUNERS: dict[PeftType, type[BaseTuner]] = {}  # filled as the tuner classes are defined
FORWARD_ONLY = {"adapter_names", "alora_offsets"}  # arguments of PeftModel.forward that the model never sees


class BaseTuner(Slots):
    """A model with adapters of one method. Attributes: `model`, `peft_config` (by adapter name), `active_adapter`.

    Tensors that all layers share (VeRA's projections) are slots of this module: `base_model.vera_A.default`.
    """

    method: ClassVar[PeftType | None] = None
    root: ClassVar[str] = "model"  # where the base model is, in live names
    model: Any  # whatever nn.Module it is

    def __init_subclass__(cls, method: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if method is not None:
            cls.method = PeftType(method)
            TUNERS[cls.method] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ):
        super().__init__()
        self._begin(model)
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        self.add(adapter_name, configs[adapter_name], low_cpu_mem_usage=low_cpu_mem_usage, keys=state_dict)

    def _begin(self, model: Any) -> None:
        self.place(model)
        self.context = Context()
        self.peft_config: dict[str, PeftConfig] = {}
        self.kinds: dict[str, type[Adapter]] = {}  # the classes of adapters on layers, by name
        self.active_adapter: str | Sequence[str] = []
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.biases: dict[str, tuple[nn.Parameter, Tensor]] = {}  # saved key -> (parameter, the values not in use)
        self.bias_owner: str | None = None  # the adapter that trains the biases
        self.biases_on = True
        self.grouped: dict[str, BufferDict] = {}  # what groups of layers share: slot -> container
        self.growth: Any = None  # the hook that says how far `generate` is, for adapters that need to know
        self.on_unload: list[Any] = []  # what undoes changes to the model beside its layers

    @classmethod
    def around(cls, model: nn.Module) -> Any:
        """A tuner around a model, without any adapter yet."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner._begin(model)
        tuner.training = model.training
        return tuner

    def place(self, model: Any) -> None:
        """Put the base model where all live names begin."""
        self.model = model

    def adapter_class(self, config: Any) -> type[Adapter]:
        """The class of the adapters for a configuration, on this model."""
        return adapter_class(config)

    def check_name(self, name: Any) -> None:
        """Raise `AdapterNameError` unless a new adapter may have that name."""
        check_adapter_name(name, self.model)

    # -------------------------------------------------------------------------------------------------------- adding
    @lasting()
    @exact()
    @sized()
    def add(
        self,
        name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        strict: bool = True,
        keys: Any = None,
        ignore: bool = False,
    ) -> Any:
        """Build adapter `name` for `config`, load `weights` into it (a checkpoint's tensors), and put it in place.

        The first adapter of a model becomes active. On any error the model is left as it was. Returns what loading
        reports, or None. `strict` and `ignore` are for loading, as in `state.check`.
        """
        if name in self.peft_config:
            raise AdapterNameError(f"Adapter with name '{name}' already exists.")
        report = None
        if weights is None:
            plan = ModelPlan(self, name, config, empty=low_cpu_mem_usage, autocast=autocast, keys=keys)
        else:
            plan, report = self._plan_loaded(name, config, autocast, weights, strict, ignore)
        first = not self.peft_config
        plan.commit()
        self.peft_config[name], self.kinds[name] = config, plan.cls
        self.model.peft_config = self.peft_config
        both = (self.targeted_module_names, plan.modules), (self.targeted_parameter_names, plan.parameters)
        for into, paths in both:
            into[:] = dict.fromkeys([*into, *paths])
        if plan.undo is not None:
            self.on_unload.append(plan.undo)
        if plan.cls.per_sample is not None and self.growth is None:
            self.growth = self.model.register_forward_pre_hook(Growth(self.context), with_kwargs=True)
        if first:
            self._freeze_base(plan.seen)
            self.active_adapter = name
        self._own_biases(name, config)
        plan.finish()
        if plan.cls.changes_base(config):
            tying.note_untied(self.model, f"by adapter {name!r}")
        names = self.active_adapters
        training = name in names and not config.inference_mode and not self._disabled
        held = [p for module in plan.seen for p in module._parameters.values() if p is not None] if first else []
        if training and any(p.is_inference() for p in held):
            warnings.warn(
                "The base model was made under torch.inference_mode(), so that torch computes no gradients through it. "
                "To train the adapter, make or load the base model outside of it.",
                PeftWarning,
            )
        for layer in plan.placed:
            active = [n for n in names if isinstance(layer, Layer) or n in layer.adapters]
            vars(layer).update(_active_adapter=active, _disable_adapters=self._disabled)
            layer.set_requires_grad(name, training)
            if self._disabled and name in names and not config.inference_mode:
                layer.paused.add(name)
            if not self.training:  # added to a model in eval(), it is in eval()
                layer.adapters[name].eval()
        return report

    def _plan_loaded(
        self, name: str, config: Any, autocast: bool, weights: Any, strict: bool, ignore: bool
    ) -> tuple[ModelPlan, Any]:
        """A plan filled with a checkpoint. What is to be loaded is not initialised, unless it is lacking."""
        weights = incoming(weights, config)
        empty = not adapter_class(config).changes_base(config)
        plan = ModelPlan(self, name, config, loading=True, empty=empty, autocast=autocast)
        try:
            report = plan.load(weights, strict, ignore)
            if plan.incomplete(report):
                plan.give_up()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they were given a moment ago
                    plan = ModelPlan(self, name, config, loading=True, autocast=autocast)
                    plan.load(weights, strict, ignore)
        except BaseException:
            plan.give_up()
            raise
        return plan, report

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Build the adapter whose configuration stands at `peft_config[adapter_name]` already."""
        config = self.peft_config.pop(adapter_name)
        self.add(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage, keys=state_dict)

    def further_entries(self, name: str, prefix: str) -> Iterable[Entry]:
        """What a checkpoint of adapter `name` holds beside the tensors of layers, with `prefix` before the keys."""
        return ()

    def shared(self, slot: str) -> Any:
        """The container of a slot that all layers look at, or those of a group; None when there is no such slot."""
        return self.shared_slots().get(slot)

    def shared_slots(self) -> dict[str, Any]:
        """The containers of all tensors that layers share, by slot."""
        return {slot: self._modules[slot] for slot in self.adapter_layer_names + self.other_param_names} | self.grouped

    def put(self, slot: str, name: str, value: Any, persistent: bool = False) -> None:
        """Store what layers share; a tensor in the slot "frod_V.query" lies in the module `frod_V`, under `query`."""
        head, _, group = slot.rpartition(".")
        if not head:
            return super().put(slot, name, value, persistent)
        groups: Any = self._modules.setdefault(head, nn.ModuleDict())
        self.grouped[slot] = groups._modules.setdefault(group, BufferDict(persistent=persistent))
        self.grouped[slot][name] = value

    def drop(self, name: str) -> None:
        """Forget what layers share for adapter `name`."""
        super().drop(name)
        for box in self.grouped.values():
            if name in box:
                del box[name]

    @staticmethod
    def _freeze_base(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if not isinstance(module, (Layer, ModulesToSaveWrapper)):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad = False

    @lasting()
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """float16, bfloat16 and float8 tensors of an adapter become float32, which training needs."""
        if autocast_adapter_dtype and "Whole" not in adapter_class(self.peft_config[adapter_name]).bases:
            for owner in (self, *layers(self.model)):
                owner.widen(adapter_name)

    # ----------------------------------------------------------------------------------------------- trained biases
    def _own_biases(self, name: str, config: Any) -> None:
        """With `bias="all"` or `"..._only"`, train the biases; keep their old values for when the adapter is off."""
        bias = getattr(config, "bias", "none")
        if bias == "none":
            return
        self.bias_owner, self.biases_on = name, True
        for entry in entries_of_biases(self.model, name, bias, ""):
            parameter = entry.box[entry.key]
            self.biases[entry.saved] = (parameter, parameter.data.clone())
            parameter.requires_grad = not config.inference_mode and name in self.active_adapters

    @lasting()
    def _use_biases(self) -> None:
        """Swap trained and original biases so that the trained ones are in use while their adapter is."""
        on = self.bias_owner in self.active_adapters and not self._disabled
        if on != self.biases_on:
            for layer in layers(self.model):
                if layer.merged and layer.base.keeps("bias"):  # what it keeps would be the wrong one of the two
                    layer.unmerge()
            for key, (parameter, other) in self.biases.items():
                self.biases[key] = (parameter, parameter.data)
                parameter.data = other.to(parameter)  # the model may have moved since
            self.biases_on = on

    def trained_bias(self, key: str) -> Tensor | None:
        """The trained values of a bias, in use or not."""
        if key not in self.biases:
            return None
        parameter, other = self.biases[key]
        return parameter.data if self.biases_on else other

    # -------------------------------------------------------------------------------------------------------- running
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; `task_ids` (batch,) for methods that route by task, `adapter_names` as in PeftModel."""
        with self._enable_peft_forward_hooks(*args, **kwargs), self._for_tasks(kwargs):
            return self.context.kept(self.model(*args, **{k: v for k, v in kwargs.items() if k not in FORWARD_ONLY}))

    @property
    def takes_task_ids(self) -> bool:
        """Whether `forward` needs `task_ids`, because a method routes by task."""
        return any(kind.by_task for kind in self.kinds.values())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate; takes `task_ids` and `adapter_names` as `forward` does."""
        hooks = self._enable_peft_forward_hooks(*args, **kwargs)
        with hooks, self._for_tasks(kwargs), self._growing(args, kwargs):
            return self.model.generate(*args, **{k: v for k, v in kwargs.items() if k not in FORWARD_ONLY})

    def _growing(self, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """While `generate` runs, each pass notes how far beyond the given input it reaches: see `Growth`."""
        length = length_of(args, kwargs) if self.context.now.by_sample else None
        return nullcontext() if length is None else self.context.telling(given=length)

    def _for_tasks(self, kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Take `task_ids` out of a call's arguments, and tell them."""
        if not self.takes_task_ids:
            return nullcontext()
        return self.context.telling(task_ids=kwargs.pop("task_ids", None))

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """While it is open, `adapter_names` gives every sample of the batch its adapter; adapters know the inputs."""
        return self._tell(args, kwargs)

    def _tell(self, args: tuple, kwargs: dict[str, Any], anew: bool = False) -> AbstractContextManager[Any]:
        """The same; inputs that a PeftModel has told of already count, unless it is one that asks (`anew`)."""
        names = kwargs.get("adapter_names")
        if names is not None:
            self._check_names(names)
        told: dict[str, Any] = {}
        if names is not None:
            told.update(adapter_names=list(names), beams=kwargs.get("num_beams") or 1)
        if anew or not self.context.now.by_sample:
            if by_sample := self._noticed(names or self.active_adapters, args, kwargs):
                told["by_sample"] = by_sample
        return self.context.telling(**told) if told else nullcontext()

    def _check_names(self, names: Any) -> None:
        if self.training:
            raise BatchError("Cannot pass `adapter_names` when the model is in training mode.")
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise BatchError(f"`adapter_names` must be a list with one name for each sample, got {names!r}.")
        if unknown := sorted(set(names) - set(self.peft_config) - {BASE}):
            raise BatchError(f"Trying to infer with non-existing adapter(s): {', '.join(map(str, unknown))}")

    def _noticed(self, names: Iterable[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the adapters `names` make of the arguments of a pass; see `Pass.by_sample`."""
        found = {}
        for name in names:
            kind = self.kinds.get(name)
            if kind is not None and kind.per_sample is not None and name not in found:
                inputs = {"input_ids": args[0], **kwargs} if args else kwargs
                found[name] = kind.per_sample(self.peft_config[name], inputs)
        return found

    # ----------------------------------------------------------------------------------------------- which adapter
    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in `forward`."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters active, and trainable unless `inference_mode`; freeze the others."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if unknown := [n for n in names if n not in self.peft_config]:
            raise AdapterNameError(f"Adapter {unknown[0]} not found; this model has {sorted(self.peft_config)}.")
        if len(names) > 1:
            for name in names:
                if method_class(self.peft_config[name]).of_modules():
                    method = self.peft_config[name].method.value
                    raise AdapterNameError(f"{method} allows one active adapter, got {names}.")
        if self.biases:
            check_biases(self.model)
        found = [layer for _, _, layer in adapted(self.model)]
        for layer in found:
            if isinstance(layer, ModulesToSaveWrapper) and len([n for n in names if n in layer.modules_to_save]) > 1:
                raise AdapterNameError(f"Only one of {names} can be active: all train one module (modules_to_save).")
        for layer in found:  # before any layer is unmerged, as setting adapters does
            if isinstance(layer, Layer) and layer.merged:
                layer.base.check_written()
        for layer in found:
            layer.set_adapter(names, inference_mode)
        self.active_adapter = adapter_name
        for slot in self.adapter_layer_names:
            for name, value in getattr(self, slot).items():
                value.requires_grad_(name in names and not inference_mode)
        self._use_biases()
        for parameter, _ in self.biases.values():
            parameter.requires_grad = self.bias_owner in names and not inference_mode

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, without activating them."""
        for _, _, layer in adapted(self.model):
            layer.set_requires_grad(adapter_names, requires_grad)

    @property
    def _disabled(self) -> bool:
        return self.__dict__.get("_off", False)

    @property
    def enabled(self) -> bool | str:
        """Whether the adapters are switched on; "irregular" when they are on some layers only."""
        states = {not layer.disable_adapters for _, _, layer in adapted(self.model)} or {not self._disabled}
        return "irregular" if len(states) > 1 else states.pop()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        if self.biases:
            check_biases(self.model)
        found = [layer for _, _, layer in adapted(self.model)]
        for layer in found if not enabled else ():  # before any layer is unmerged, as switching off does
            if layer.merged_adapters:
                layer.base.check_written()
        self._off = not enabled
        for layer in found:
            layer.enable_adapters(enabled)
        self._use_biases()

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the output is the base model's, trained biases and modules included."""
        self._enable_adapter_layers(False)

    def enable_adapter_layers(self) -> None:
        """Switch the active adapters on again."""
        self._enable_adapter_layers(True)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within the context all adapters are off; then they are on or off as they were before."""
        if self.enabled is False:
            yield
            return
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self.enable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. When it was the active one, the first that is left takes its place."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"Adapter {adapter_name} does not exist; this model has {sorted(self.peft_config)}.")
        if any(adapter_name in layer.merged_adapters for layer in layers(self.model)):
            what = f"adapter(s) ['{adapter_name}']"
            raise MergeError(f"Cannot delete {what} while they are merged. Please unmerge them first.")
        active = [n for n in self.active_adapters if n != adapter_name]
        rest = [n for n in self.peft_config if n != adapter_name]
        if not active and rest:
            active = sorted(rest)[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                PeftWarning,
            )
        if self.bias_owner == adapter_name:
            self._restore_biases()
        for _, _, layer in adapted(self.model):
            layer.delete_adapter(adapter_name)
        self.drop(adapter_name)
        del self.peft_config[adapter_name]
        self.kinds.pop(adapter_name, None)  # X-LoRA has none of its own
        was = self.active_adapters
        self.active_adapter = active
        if active != was:
            self.set_adapter(active)

    @lasting()
    def _restore_biases(self) -> None:
        for parameter, other in self.biases.values():
            if self.biases_on:
                parameter.data = other.to(parameter)
            parameter.requires_grad = False
        self.biases, self.bias_owner, self.biases_on = {}, None, True

    # -------------------------------------------------------------------------------------------------------- merging
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (default: the active ones) into the frozen weights; `unmerge_adapter` takes them out again.

        With some of several active adapters merged the model computes the same as with none or all of them. (peft, and
        so diffusers' `fuse_lora(adapter_names=...)`, runs the merged weights alone and drops the active adapters that
        are not in them.) Sharded models (FSDP2): all processes must call this together.

        While anything is merged, `load_state_dict` refuses weights for those layers, and an edit of them makes
        unmerging raise `MergeError`; moving and casting the model is fine. An adapter that was changed after it was
        merged, its values or its scale, must be unmerged before others are merged too. Under torch.autocast the
        weights are the same as without.

        When a layer refuses, those merged by this call are unmerged again and `MergeError` is raised.
        """
        self._merge(layers(self.model), safe_merge, adapter_names)

    @torch.no_grad()
    def _merge(
        self, todo: list[Layer], safe: bool, names: list[str] | None, progress: bool = False, for_good: bool = False
    ) -> None:
        """Merge `names` into the layers `todo`. `for_good`: it will not be undone, so originals need not be kept."""
        if isinstance(names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
        if unknown := [n for n in names or () if n not in self.peft_config]:
            raise AdapterNameError(f"Adapter {unknown[0]} not found; this model has {sorted(self.peft_config)}.")
        if any(getattr(c, "layer_replication", None) for c in self.peft_config.values()):
            raise MergeError("Cannot merge layers that are replicated: their adapters differ, their weight is one.")
        for layer in todo:
            layer.reshard()
        tying.part(self, todo, names)
        done: list[tuple[Layer, list[str]]] = []
        in_place = for_good and not safe and all(layer.merges_in_place(names) for layer in todo)
        try:
            for layer in progress_bar(list(reversed(todo)), "Merging adapters", progress):
                if in_place:
                    layer.merge_in_place(names)
                    continue
                before = list(layer.merged_adapters)
                layer.merge(safe_merge=safe, adapter_names=names)
                done.append((layer, [n for n in layer.merged_adapters if n not in before]))
        except Exception:
            for layer, merged in reversed(done):
                if merged:
                    layer.unmerge(merged)
            raise

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the frozen weights; not one bit of them differs from before."""
        self._unmerge(layers(self.model))

    @torch.no_grad()
    def _unmerge(self, todo: list[Layer]) -> None:
        for layer in todo:  # before any layer is unmerged
            layer.reshard()
            layer.base.check_written()
        for layer in todo:
            layer.unmerge_checked()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for _, live, layer in adapted(self.model):  # before anything is loaded
            if isinstance(layer, Layer):
                layer.check_loads(state_dict, f"{prefix}{self.root}.{live}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The model with adapters (default: the active ones) in its weights, and no adapter modules left.

        `progressbar` shows how far it is; `safe_merge` raises `MergeError` instead of storing non-finite numbers.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._merge(layers(self.model), safe_merge, adapter_names, progressbar, for_good=True)
        model = self._unload(names)
        tying.note_untied(model)
        return model

    def unload(self) -> nn.Module:
        """The base model without any adapter, its weights as they were before adapters were merged into them.

        What a start has taken out of them for good (PiSSA, OLoRA, ...) stays out.
        """
        self._unmerge([layer for layer in layers(self.model) if layer.merged])
        self._restore_biases()
        model = self._unload([])
        while self.on_unload:
            self.on_unload.pop()()
        return model

    def _unload(self, names: list[str]) -> nn.Module:
        at = {live: module for _, live, module in walk(self.model)}
        for live, module in reversed(at.items()):
            if isinstance(module, Layer):
                module.base.forget()
                replacement = module.base_layer
            elif isinstance(module, ModulesToSaveWrapper):
                mine = [n for n in names if n in module.modules_to_save]
                replacement = module.modules_to_save[mine[0]] if mine else module.original_module
            elif isinstance(module, TrainableTokensWrapper):
                replacement = module.token_adapter
            else:
                continue
            head, _, last = live.rpartition(".")
            parent = at[head] if head in at else self.model.get_submodule(head)  # a wrapper is not in `at`
            parent._modules[last] = replacement
        if "peft_config" in vars(self.model):
            del self.model.peft_config
        if self.growth is not None:
            self.growth.remove()
            self.growth = None
        return self.model

    # ---------------------------------------------------------------------------------------------------------- other
    @property
    def prefix(self) -> str:
        """What the slots of the method begin with, for example "lora_"."""
        assert self.method is not None
        return ADAPTERS[self.method][0].prefix

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's own configuration as a dict."""
        return model_config(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            child = self.root.partition(".")[0]
            if name in ("model", child, *HOOKS) or child not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)


class Growth:
    """A hook before a model's passes: while `generate` runs, it notes how far beyond the given input each reaches."""

    def __init__(self, context: Context):
        self.context = context

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        told = self.context.now
        if told.given is not None:
            now, cache = length_of(args, kwargs) or 0, kwargs.get("past_key_values")
            told.grown = (max(now, told.given) if cache is None else cached_tokens(cache) + now) - told.given


def length_of(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many tokens a model's arguments hold for each sample, or None when they hold none."""
    names = "inputs_embeds", "input_ids", "inputs"
    given = next((t for t in (*map(kwargs.get, names), *args[:1]) if isinstance(t, Tensor)), None)
    return None if given is None else given.shape[min(1, given.dim() - 1)]


def progress_bar(items: list[Any], title: str, show: bool) -> Iterator[Any]:
    """The items, one by one; with `show`, how far it is stands on stderr."""
    for count, item in enumerate(items, 1):
        yield item
        if show:
            end = "\n" if count == len(items) else ""
            print(f"\r{title}: {count}/{len(items)}", end=end, file=sys.stderr, flush=True)


def tuner_class(peft_type: Any) -> type[BaseTuner]:
    """The class of models with adapters of that method: one of its own, or else a plain one.

    Raises `UnsupportedFeatureError` for what is no such method.
    """
    if peft_type in PeftType.__members__:
        registry.load(method := PeftType(peft_type))
        if method not in TUNERS and method in ADAPTERS:
            name, own = f"{CONFIGS[method].__name__.removesuffix('Config')}Model", {"__doc__": BaseTuner.__doc__}
            globals()[name] = type(name, (BaseTuner,), {**own, "__module__": __name__}, method=method)
        if method in TUNERS:
            return TUNERS[method]
    raise UnsupportedFeatureError(f"peft_type {peft_type!r} is not in this release of minipeft.")


def __getattr__(name: str) -> Any:
    """Tuner classes, by name: so pickle finds the plain ones."""
    known = registry.TUNERS | {f"{c.__name__.removesuffix('Config')}Model": kind for kind, c in CONFIGS.items()}
    if name not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tuner_class(known[name])
