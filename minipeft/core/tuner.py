"""A model with adapters on its layers, and what can be done with them: put in, run, switch, merge, take out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapter import ADAPTERS, Adapter, adapter_class, method_class
from .bases import autocast_off, inference_mode_off
from .batch import BASE
from .boxes import BufferDict, Slots
from .config import PeftConfig, PeftType
from .errors import AdapterNameError, BatchError, MergeError, PeftWarning, sized
from .layer import Context, HoldsAdapters, Layer, adapted, layers
from .offload import HOOKS, offloading
from .plan import Plan, check_adapter_name
from .state import incoming
from .stored import memory, users_of
from .walk import Wrapper, walk


class Tuner(Slots):
    """A model with adapters on its layers. Attributes: `model`, `peft_config` (by adapter name), `active_adapter`.

    Tensors that all layers share (VeRA's projections) are slots of this module: `base_model.vera_A.default`.
    """

    method: ClassVar[PeftType | None] = None
    root: ClassVar[str] = "model"  # where the base model is, in live names
    plan: ClassVar[type[Plan]] = Plan
    never_models: ClassVar[frozenset[str]] = frozenset({"adapter_names"})  # arguments that the model never sees
    model: Any  # whatever nn.Module it is

    def _begin(self, model: Any) -> None:
        self.set_model(model)
        self.context = Context()
        self.peft_config: dict[str, PeftConfig] = {}
        self.kinds: dict[str, type[Adapter]] = {}  # the classes of adapters on layers, by name
        self.active_adapter: str | Sequence[str] = []
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.grouped: dict[str, BufferDict] = {}  # what groups of layers share: slot -> container
        self.on_unload: list[Any] = []  # what undoes changes to the model beside its layers
        self._disabled = False

    @classmethod
    def wrap(cls, model: nn.Module) -> Any:
        """A tuner around a model, without any adapter yet."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner._begin(model)
        tuner.training = model.training
        return tuner

    @classmethod
    def of(cls, model: nn.Module) -> Any:
        """A tuner around a model whose layers have adapters already: they hold all that it needs."""
        tuner = cls.wrap(model)
        found = layers(model)
        tuner.peft_config = vars(model).get("peft_config") or {}
        tuner.kinds = {name: adapter_class(config) for name, config in tuner.peft_config.items()}
        if found:
            tuner.context, tuner.active_adapter = found[0].context, found[0].active_adapters
            tuner._disabled = found[0].disable_adapters
        for layer in found:
            for slot, box in layer.shared_boxes.items():
                tuner.take_over(slot, box)
        return tuner

    def take_over(self, slot: str, box: Any) -> None:
        """Have a box that layers share already, as one of its own."""
        head, _, group = slot.rpartition(".")
        if head:
            groups: Any = self._modules.setdefault(head, nn.ModuleDict())
            groups._modules[group] = self.grouped[slot] = box
        elif slot not in self._modules:
            self.register(slot, box, trained=isinstance(box, nn.ParameterDict))

    def set_model(self, model: Any) -> None:
        """Put the base model where all live names begin."""
        self.model = model

    def adapter_class(self, config: Any) -> type[Adapter]:
        """The class of the adapters for a configuration, on this model."""
        return adapter_class(config)

    def check_name(self, name: Any) -> None:
        """Raise `AdapterNameError` unless a new adapter may have that name."""
        check_adapter_name(name, self.model)

    # ----------------------------------------------------------------------------------------------------------- adding
    @inference_mode_off()
    @autocast_off()
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
            plan = self.plan(self, name, config, empty=low_cpu_mem_usage, autocast=autocast, keys=keys)
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
        if first:
            self._freeze_base(plan.seen)
            self.active_adapter = name
        self._added(plan)
        names = self.active_adapters
        training = name in names and not config.inference_mode and not self._disabled
        held = [p for module in plan.seen for p in module._parameters.values() if p is not None] if first else []
        if training and any(p.is_inference() for p in held):
            warnings.warn(
                "The base model was made under torch.inference_mode(), so that torch computes no gradients through it. "
                "To train the adapter, make or load the base model outside of it.",
                PeftWarning,
            )
        for layer in plan.holders:
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
    ) -> tuple[Plan, Any]:
        """A plan filled with a checkpoint. What is to be loaded is not initialised, unless it is lacking."""
        weights = incoming(weights, config)
        empty = not adapter_class(config).changes_base(config)
        plan = self.plan(self, name, config, loading=True, empty=empty, autocast=autocast)
        try:
            report = plan.load(weights, strict, ignore)
            if plan.incomplete(report):
                plan.abort()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they were given a moment ago
                    plan = self.plan(self, name, config, loading=True, autocast=autocast)
                    plan.load(weights, strict, ignore)
        except BaseException:
            plan.abort()
            raise
        return plan, report

    def _added(self, plan: Any) -> None:
        """What is to be done when an adapter is in its place, before it becomes trainable."""
        plan.finish()

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
            if not isinstance(module, HoldsAdapters):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad = False

    # ---------------------------------------------------------------------------------------------------------- running
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; `adapter_names` as in PeftModel, and what methods route by, as `task_ids` (batch,)."""
        with self._tell(args, kwargs):
            return self.context.keep_for_backward(self.model(*args, **self._for_model(kwargs)))

    @property
    def own_inputs(self) -> set[str]:
        """Arguments of a call that are for adapters, and that the model does not take."""
        return set(self.never_models).union(*{kind.inputs for kind in self.kinds.values()})

    def _for_model(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        own = self.own_inputs if kwargs else ()
        return {name: value for name, value in kwargs.items() if name not in own}

    def _tell(self, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Tell what a call says of each sample; what a call around it, `generate`, has told of its input stays."""
        names = None if self._disabled else kwargs.get("adapter_names")
        if names is not None:
            self._check_names(names)
        told: dict[str, Any] = {}
        if names is not None:
            told.update(adapter_names=list(names), beams=kwargs.get("num_beams") or 1)
        if not (self._disabled or self.context.now.by_sample):
            if by_sample := self._sample_values(names or self.active_adapters, args, kwargs):
                told["by_sample"] = by_sample
        return self.context.telling(**told) if told else nullcontext()

    def _check_names(self, names: Any) -> None:
        if self.training:
            raise BatchError("Cannot pass `adapter_names` when the model is in training mode.")
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise BatchError(f"`adapter_names` must be a list with one name for each sample, got {names!r}.")
        if unknown := sorted(set(names) - set(self.peft_config) - {BASE}):
            raise BatchError(f"Trying to infer with non-existing adapter(s): {', '.join(map(str, unknown))}")

    def _sample_values(self, names: Iterable[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the adapters `names` make of the arguments of a pass; see `Pass.by_sample`."""
        found = {}
        for name in names:
            kind = self.kinds.get(name)
            if kind is not None and kind.per_sample is not None and name not in found:
                inputs = {"input_ids": args[0], **kwargs} if args else kwargs
                found[name] = kind.per_sample(self.peft_config[name], inputs)
        return found

    # ---------------------------------------------------------------------------------------------------- which adapter
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
        self._check_switching()
        found = [layer for _, _, layer in adapted(self.model)]
        for layer in found:
            if layer.one_at_a_time and len([n for n in names if n in layer.adapters]) > 1:
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
        self._switched()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, without activating them."""
        for _, _, layer in adapted(self.model):
            layer.set_requires_grad(adapter_names, requires_grad)

    def _check_switching(self) -> None:
        """Refuse to switch adapters, before any is."""

    def _switched(self) -> None:
        """What is to be done when other adapters are active, or on, than before."""

    @property
    def enabled(self) -> bool | str:
        """Whether the adapters are switched on; "irregular" when they are on some layers only."""
        states = {not layer.disable_adapters for _, _, layer in adapted(self.model)} or {not self._disabled}
        return "irregular" if len(states) > 1 else states.pop()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self._check_switching()
        found = [layer for _, _, layer in adapted(self.model)]
        for layer in found if not enabled else ():  # before any layer is unmerged, as switching off does
            if layer.merged_adapters:
                layer.base.check_written()
        self._disabled = not enabled
        for layer in found:
            layer.enable_adapters(enabled)
        self._switched()

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
        for _, _, layer in adapted(self.model):
            layer.delete_adapter(adapter_name)
        self.drop(adapter_name)
        del self.peft_config[adapter_name]
        self.kinds.pop(adapter_name, None)  # X-LoRA has none of its own
        was = self.active_adapters
        self.active_adapter = active
        if active != was:
            self.set_adapter(active)

    # ---------------------------------------------------------------------------------------------------------- merging
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
        mark_shared(self.model, todo, names)
        if for_good:
            return self._merge_for_good(todo, safe, names, progress)
        done: list[tuple[Layer, list[str]]] = []
        try:
            for layer in reversed(todo):
                before = list(layer.merged_adapters)
                layer.merge(safe_merge=safe, adapter_names=names)
                done.append((layer, [n for n in layer.merged_adapters if n not in before]))
        except Exception:
            for layer, merged in reversed(done):
                if merged:
                    layer.unmerge(merged)
            raise

    def _merge_for_good(self, todo: list[Layer], safe: bool, names: list[str] | None, progress: bool) -> None:
        """Merge one frozen layer after the other, of which one at a time is kept as it was.

        Before the first is changed, all are merged for trial and put back, so that none refuses later.
        """
        chains: dict[Layer, list[tuple[Layer, list[str]]]] = {}  # by the innermost layer: those of several methods
        for layer in reversed(todo):
            if new := layer.to_merge(names):
                chains.setdefault(layer.chain[-1], []).append((layer, new))
        alone = {innermost: chain[0] for innermost, chain in chains.items() if len(chain) == 1}
        in_place = {innermost: new for innermost, (layer, new) in alone.items() if layer.merges_in_place(new)}
        for innermost, chain in chains.items():
            if innermost in in_place:
                innermost.merge_in_place(in_place[innermost], trial=True, safe=safe)
                continue
            done: list[tuple[Layer, list[str]]] = []
            try:
                for layer, new in chain:
                    layer.merge_new(new, safe)
                    done.append((layer, new))
                innermost.check_acts()
            finally:
                for layer, new in reversed(done):
                    layer.unmerge_checked(new)
        for innermost in progress_bar(list(chains), "Merging adapters", progress):
            if innermost in in_place:
                innermost.merge_in_place(in_place[innermost])
                innermost.merged_adapters = in_place[innermost]  # should something end this here
                continue
            for layer, new in chains[innermost]:
                layer.merge_new(new, False)
            innermost.base.forget()
            innermost.register_backup()

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

        `progressbar` shows how far it is; `safe_merge` raises `MergeError` instead of storing non-finite numbers. It
        takes memory for one layer at a time: all are merged for trial, one by one, and then for good.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._merge(layers(self.model), safe_merge, adapter_names, progressbar, for_good=True)
        return self._unload(names)

    def unload(self) -> nn.Module:
        """The base model without any adapter, its weights as they were before adapters were merged into them.

        What a start has taken out of them for good (PiSSA, OLoRA, ...) stays out.
        """
        self._unmerge([layer for layer in layers(self.model) if layer.merged])
        model = self._unload([])
        while self.on_unload:
            self.on_unload.pop()()
        return model

    def _unload(self, names: list[str]) -> nn.Module:
        at = {live: module for _, live, module in walk(self.model)}
        for live, module in reversed(at.items()):
            if not isinstance(module, Wrapper):
                continue
            head, _, last = live.rpartition(".")
            parent = at[head] if head in at else self.model.get_submodule(head)  # a wrapper is not in `at`
            parent._modules[last] = module.unwrapped(names)
        if "peft_config" in vars(self.model):
            del self.model.peft_config
        return self.model

    # ------------------------------------------------------------------------------------------------------------ other
    @property
    def prefix(self) -> str:
        """What the slots of the method begin with, for example "lora_"."""
        assert self.method is not None
        return ADAPTERS[self.method][0].prefix

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            child = self.root.partition(".")[0]
            if name in ("model", child, *HOOKS) or child not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)


def tuner_of(model: nn.Module) -> Any:
    """The tuner of a PeftModel, or the tuner itself, or None for a model with injected adapters."""
    inner = vars(model).get("_modules", {}).get("base_model")
    return next((m for m in (model, inner) if isinstance(m, Tuner)), None)


def mark_shared(model: nn.Module, layers: list[Layer], names: list[str] | None) -> None:
    """Before merging: mark layers whose weight is used elsewhere too, and there with other adapters or none.

    Merging gives those a weight of their own, so that it changes nothing else.
    """
    users = users_of(module for _, _, module in walk(model))
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        bias = layer.base.innermost.stored()[1]
        users_of_bias = users.get(memory(bias), set()) if isinstance(bias, Tensor) else set()
        layers_with_it = [m for m in users_of_bias if m._parameters.get("weight") is not None]  # not BERT's head
        layer.base.innermost.shares_bias = len(layers_with_it) > 1
        groups.setdefault(memory(layer.base.innermost.stored()[0]), []).append(layer)
    for layer in layers:
        if offloading(layer.base.leaf) and any(adapter.tied_to for adapter in layer.adapters.values()):
            layer.base.innermost.shares_weight = True  # offloading gave it a weight of its own
    for weight, group in groups.items():
        if len(users.get(weight, ())) < 2:
            continue
        held: dict[nn.Module, set[Any]] = {module: set() for module in users[weight]}
        for layer in group:
            new = layer.active_adapters if names is None else names
            for name in {*layer.merged_adapters, *new} & layer.adapters.keys():
                adapter = layer.adapters[name]
                held[layer.base.leaf].add(adapter.tied_to or adapter)
        apart = any(adapters != next(iter(held.values())) for adapters in held.values())
        for layer in group:
            if apart and layer.base.changed and not layer.base.innermost.shares_weight:
                raise MergeError("Tied layers are merged already, and these adapters are not tied; unmerge first.")
            layer.base.innermost.shares_weight = apart


def progress_bar(items: list[Any], title: str, show: bool) -> Iterator[Any]:
    """The items, one by one; with `show`, how far it is stands on stderr."""
    for count, item in enumerate(items, 1):
        yield item
        if show:
            end = "\n" if count == len(items) else ""
            print(f"\r{title}: {count}/{len(items)}", end=end, file=sys.stderr, flush=True)
