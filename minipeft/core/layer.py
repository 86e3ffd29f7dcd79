"""What stands in the model where an adapted layer stood: a `Layer`."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapter import Adapted, Adapter
from .bases import Base, Param, Whole, autocast_off
from .batch import run_layer
from .boxes import LOW_PRECISION, BufferDict, Slots, contents
from .errors import BatchError, MergeError, PeftWarning
from .folding import at_once, broken, finite, in_parts, near, part_by_part, unfit, upcast, upcast_pair, upcast_tensor
from .kinds import base_of
from .offload import HOOKS, hooked, onload
from .passes import Context as Context
from .stored import reshard, sharded
from .walk import Wrapper, walk


def named_input(module: nn.Module, kwargs: dict[str, Any]) -> str:
    """The name by which a call gives the input of `module`: that of the first argument of its own forward.

    Raises `TypeError` when it is not among the arguments.
    """
    first = "hidden_states"  # as transformers and diffusers call whole blocks
    if first not in kwargs:
        first = next(iter(inspect.signature(module.forward).parameters), "")
    if first not in kwargs:
        got = f"; got {', '.join(kwargs)}" if kwargs else ""
        raise TypeError(f"{type(module).__name__}.forward() misses its input, {first!r}{got}.")
    return first


class HoldsAdapters:
    """What holds adapters, a layer or a module trained in full: which of them are on, and which are trained.

    A class gives `_train`.
    """

    one_at_a_time = False  # True: only one of its adapters can be active
    adapters: Any  # by name
    trained: set[str]  # names of the adapters that are trainable
    paused: set[str]  # names of those that will be when adapters are switched on again
    _active_adapter: list[str]
    _disable_adapters: bool

    def _train(self, name: str, on: bool) -> None:
        """Make the tensors of adapter `name` trainable, or freeze them, and note that in `trained`."""
        raise NotImplementedError

    def _train_only(self, names: Collection[str]) -> None:
        """Train the adapters in `names` and freeze the others; only those whose state changes are touched."""
        for name in self.trained - set(names):
            self._train(name, False)
        for name in names:
            if name in self.adapters:
                self._train(name, True)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make `adapter_names` active and (unless `inference_mode`) trainable, and freeze all others."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.paused = set(() if inference_mode else names)
        self._train_only(self.paused)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, with all frozen, or on again, with those trainable that were before.

        When they are on already, the active ones become trainable.
        """
        off, self._disable_adapters = self._disable_adapters, not enabled
        if not (enabled or off):
            self.paused = set(self.trained)
        self._train_only((self.paused if off else self._active_adapter) if enabled else ())

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, without activating them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapters:
                self._train(name, requires_grad)
                (self.paused.add if requires_grad else self.paused.discard)(name)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self._active_adapter

    @property
    def active_adapter(self) -> list[str]:
        """The same, under PEFT's other name for it."""
        return self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        """Whether all adapters are switched off."""
        return self._disable_adapters


class Layer(HoldsAdapters, Slots, Wrapper):
    """A frozen layer with adapters around it.

    Every adapter ever added stands in `adapters`; those in `active_adapters` take part in `forward`, in the order in
    which they are listed there. Live parameter names are PEFT's: `base_layer.weight`, `lora_A.default.weight`.
    """

    wraps = "base_layer"
    unused: ClassVar[dict[str, tuple[str, ...]]] = {}  # by method: slots that a layer has to read, empty, if not in use
    base_layer: nn.Module
    base: Base
    method: str
    context: Context
    adapters: dict[str, Adapter]
    merged_adapters: list[str]
    folded: list[Adapter]
    fingerprints: list[Any]
    weight_is_read: bool
    weight_is_read_fused: bool
    shared_boxes: dict[str, Any]
    on_meta: bool
    autocast: bool
    on_commit: list[Callable[[], None]]
    _active_adapter: list[str]

    def __init__(self, module: nn.Module, base: Base, method: str, context: Context | None = None):
        super().__init__()
        self._modules["base_layer"] = module
        vars(self).update(  # plain values: nn.Module.__setattr__ would ask of each what it is
            base=base,
            method=method,
            context=context or Context(),
            adapters={},
            trained=set(),
            paused=set(),
            merged_adapters=[],
            folded=[],  # of the innermost layer: what its weights hold, in order
            fingerprints=[],  # and what each of those was when it was merged
            cast_input_dtype_enabled=True,
            weight_is_read=False,  # True: the model takes `.weight` instead of calling the layer
            weight_is_read_fused=False,  # True: it does so where all weights are plain tensors
            tied=False,  # True: its adapters are those of another layer, which also saves them
            shared_boxes={},  # boxes that other layers look at as well, by slot of the tuner
            on_meta=False,  # while being built: True when values are going to be loaded, and only shapes matter
            autocast=False,  # while being built: True when low-precision adapter tensors become float32
            on_commit=[],
            training=module.training,
            _active_adapter=[],
            _disable_adapters=False,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for adapter in self.adapters.values():
            adapter.move_to(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer":
            if self.base.changed:
                raise MergeError("Adapters are merged into the frozen layer; unmerge them before it is replaced.")
            kind, whole = type(self.base), type(self.base) if isinstance(self.base, Whole) else None
            parameter = self.base.weight_name if isinstance(self.base, Param) else None
            self.base = base_of(value, parameter, whole) or kind(value)
            for adapter in self.adapters.values():
                adapter.move_to(self)
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------------------------------- being built
    def cast_to_base(self, tensor: Tensor, copy: bool = False) -> Tensor:
        """`tensor` on the device of the frozen layer, and in the dtype that an adapter's tensors have there."""
        dtype, device = self.base.dtype, self.base.device
        if not (tensor.is_floating_point() and dtype.is_floating_point):
            return tensor.to(device, copy=copy)
        return tensor.to(device, torch.float32 if self.autocast and dtype in LOW_PRECISION else dtype, copy=copy)

    def cast_adapter_to_base(self, name: str) -> None:
        """Move all tensors of adapter `name` that have values there, by way of the frozen layer's dtype."""
        dtype, device = self.base.dtype, self.base.device
        if device.type == "meta":
            return
        final = torch.float32 if self.autocast and dtype in LOW_PRECISION else dtype
        for slot, tensor in list(self.tensors(name)):
            if tensor.is_meta or (tensor.dtype == dtype == final and tensor.device == device):
                continue
            if not (tensor.is_floating_point() and dtype.is_floating_point):
                tensor.data = tensor.data.to(device)
            else:
                # PEFT: not the buffers of its modules
                own = isinstance(tensor, nn.Parameter) or tensor is self.take(slot, name)
                tensor.data = tensor.data.to(device, dtype).to(final if own else dtype)

    def onloaded(self, keep: bool = False) -> AbstractContextManager[None]:
        """While it is open, offloaded tensors of the layer and its adapters are where they run; see `onload`."""
        groups = [value for value in vars(self).values() if isinstance(value, BufferDict)]  # looked at from here
        return onload(self, *groups, keep=keep)

    # ------------------------------------------------------------------------------------------------- the operator
    def operator(self, names: Sequence[str] | None = None) -> Any:
        """The operator of the base layer with the adapters `names` around it (default: those that are on)."""
        here = self.running if names is None else names
        op: Any = self.base
        if here:
            merged = any(layer.merged_adapters for layer in self.chain)
            op = self.unmerged_inside() if merged else self.inside(names)
        return self._around(op, here)

    def inside(self, names: Sequence[str] | None = None) -> Any:
        """What the adapters of this layer are put around; `names`: those of a layer of another method inside."""
        return self.base if self.base.inside is None else Inside(self.base, self.base_layer, names)

    def _around(self, op: Any, names: Sequence[str]) -> Any:
        for name in names:
            if name in self.adapters:
                op = Adapted(self.adapters[name], op)
        return op

    def unmerged_inside(self) -> Any:
        """What the adapters of this layer are put around, as if nothing was merged."""
        inside = self.base_layer
        if self.base.inside is None or not isinstance(inside, Layer):
            return Unmerged(self.base)
        return inside._around(inside.unmerged_inside(), inside.switched_on)

    @property
    def chain(self) -> list[Layer]:
        """The layers of several methods around one frozen layer, from this one inwards."""
        found = [self]
        while isinstance(inside := found[-1].base_layer, Layer) and found[-1].base.inside is not None:
            found.append(inside)
        return found

    @property
    def switched_on(self) -> list[str]:
        """Names of the adapters whose effect the layer has, merged or not, in their order."""
        if self._disable_adapters:
            return []
        active = [n for n in self._active_adapter if n in self.adapters]
        return [n for n in self.merged_adapters if n not in active] + active

    @property
    def running(self) -> list[str]:
        """Names of the adapters that take part in `forward`; none when the frozen weights have them all.

        When some are merged and others are not, all run, with the weights that the layer had before the merge.
        """
        on = self.switched_on
        if on and any(layer.merged_adapters for layer in self.chain) and not self._any_unmerged():
            return []
        return on

    def _any_unmerged(self) -> bool:
        """Whether an adapter that is on, here or further inside, is not merged."""
        return any(name not in layer.merged_adapters for layer in self.chain for name in layer.switched_on)

    def forward(self, x: Any = None, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Output of the adapted layer; `adapter_names` gives each sample of the batch its own adapter."""
        if x is None:
            x = kwargs.pop(named_input(self.base.leaf, kwargs))
        if not hooked(self):
            return self._pass(x, adapter_names, *args, **kwargs)
        with self.onloaded():
            return self._pass(x, adapter_names, *args, **kwargs)

    def _pass(self, x: Any, adapter_names: Sequence[str] | None, *args: Any, **kwargs: Any) -> Any:
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None or self.context.opened[-1].adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        names, base = self._active_adapter, self.base
        plain = base.inside is None and not base.needs_weights and not self.merged_adapters
        if plain and len(names) == 1 and names[0] in self.adapters:
            return self.adapters[names[0]].forward(x, base, *args, **kwargs)  # as `_run`, without making the operator
        return self._run(None, x, *args, **kwargs)

    def _run(self, names: Sequence[str] | None, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        op = self.operator(names)
        if self.base.needs_weights and op is not self.base:
            return self.base.apply(x, *op.read(), *args, **kwargs)
        return op(x, *args, **kwargs)

    def _mixed(self, x: Tensor, names: Sequence[str] | None, *args: Any, **kwargs: Any) -> Tensor:
        if any(layer.merged_adapters for layer in self.chain):
            raise BatchError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        now = self.context.now
        groups = now.groups(len(x), names)
        assert groups is not None
        if (mixed := getattr(next(iter(self.adapters.values()), None), "forward_mixed", None)) is not None:
            return mixed(self, groups, x, *args, **kwargs)
        if self.base.needs_weights:
            kind = type(self.base.leaf).__name__
            raise BatchError(f"Mixed batches are not possible on a {kind}: it does not map one tensor to one.")

        return run_layer(self, x, groups, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- merging
    @property
    def merged(self) -> bool:
        """Whether any adapter of this layer is in the frozen weights."""
        return bool(self.merged_adapters)

    @property
    def _innermost(self) -> Layer:
        return self.chain[-1]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Write adapters into the frozen weights: computed in float32 from the original weights, rounded once.

        `safe_merge` raises `MergeError` instead of storing numbers that are not finite. `adapter_names` defaults to
        the active adapters; names that are merged already are skipped with a warning.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        if names := self.to_merge(adapter_names):
            self.merge_new(names, safe_merge)
            if not self._any_unmerged():
                try:
                    self.check_acts()
                except MergeError:
                    self.unmerge_checked(names)
                    raise

    def to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Those of `adapter_names` (default: the active ones) that are here and not merged; warns of others."""
        names = self._named(adapter_names)
        if self.merged_adapters:
            names = [n for n in names if n not in self.merged_adapters]
            already = ", ".join(self.merged_adapters)
            warnings.warn(
                f"Already merged: {already}. "
                + (f"Now also merging {', '.join(names)}." if names else "Nothing to do."),
                PeftWarning,
            )
        return names

    def merge_new(self, names: list[str], safe: bool) -> None:
        """The same for adapters of this layer that are not merged.

        One that takes the layer's place takes also that of one that is merged, and is merged alone.
        """
        innermost, new = self._innermost, [self.adapters[name] for name in names]
        if whole := new[0].of_modules():
            if len(new) > 1:
                raise MergeError(f"{', '.join(names)} each take the place of '{new[0].path}': merge one of them.")
        # what follows another layer is merged there
        sources = {} if innermost.base.shares_weight else {a: a.tied_to for a in new if a.tied_to is not None}
        if own := [adapter for adapter in new if adapter not in sources]:
            innermost.base.check_written()
            innermost.check_folded(innermost.folded)
            self._fold(own if whole else innermost.folded + own, safe)
        for source in sources.values():
            innermost.base.source = source.layer._innermost.base
        self.merged_adapters = names if whole else self.merged_adapters + names

    def merges_in_place(self, names: list[str]) -> bool:
        """Whether `merge_in_place` can do what `merge_new` does."""
        base = self.base
        tied = any(self.adapters[name].tied_to is not None for name in names)
        return base.innermost is base and base.backup is None and base.overwrites and not (base.shares_weight or tied)

    def merge_in_place(self, names: list[str], trial: bool = False, safe: bool = False) -> None:
        """The same for good: no copy is kept, and the weight is changed where it is, in parts if all adapters can.

        `trial`: only raise what it would raise.
        """
        base, adapters = self.base, [self.adapters[name] for name in names]
        with self.onloaded(keep=not trial), autocast_off(), ExitStack() as stack:
            for adapter in adapters:
                stack.enter_context(upcast(adapter))
            W, b = base.read()
            parts = in_parts(adapters, upcast_tensor(b)) or at_once(adapters, *upcast_pair((W, b)))
            bias: list[Any] = [(base.stored()[1], parts.bias)] if base.takes_bias(parts.bias) else []
            fits = True
            for old, new in itertools.chain(part_by_part(parts, W, trial), bias):
                if not trial:
                    if new is not old:
                        old.copy_(new)
                elif not safe:
                    break
                elif not finite((new,)):
                    raise broken(adapters[-1])
                else:
                    fits = fits and finite((new.to(old.dtype),))
            if not fits:
                raise unfit(adapters[-1])

    def _named(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Those of `adapter_names` (default: the active ones) that are on this layer."""
        return [n for n in (self._active_adapter if adapter_names is None else adapter_names) if n in self.adapters]

    @torch.no_grad()
    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take adapters (default: all of this layer) out of the frozen weights; with none left, not a bit differs.

        Raises `MergeError`, with nothing changed, when the weights were edited while the adapters were in them.
        """
        self.base.check_written()
        self.unmerge_checked(adapter_names)

    def unmerge_checked(self, adapter_names: Sequence[str] | None = None) -> None:
        """The same after `base.check_written`, which takes most of its time."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", PeftWarning)
            return
        names = list(self.merged_adapters if adapter_names is None else adapter_names)
        innermost = self._innermost
        left = [a for a in innermost.folded if a.layer is not self or a.name not in names]
        if adapter_names is not None:
            innermost.check_folded(left)
        self._fold(left, False)
        self.merged_adapters = [n for n in self.merged_adapters if n not in names]
        if not any(layer.merged_adapters for layer in self.chain):
            innermost.base.source = None

    def _fold(self, folded: list[Adapter], safe: bool) -> None:
        """Let the frozen weights hold the adapters `folded`: those of inner layers first, each layer's in its order."""
        with self.onloaded(keep=True), autocast_off():
            self._fold_onloaded(folded, safe)

    def _fold_onloaded(self, folded: list[Adapter], safe: bool) -> None:
        innermost = self._innermost
        base = innermost.base
        self.reshard()
        base.check_whole()
        folded = sorted(folded, key=lambda adapter: adapter.layer.order_of(adapter.name))
        if not folded:
            base.restore()
        else:
            W, b = upcast_pair(base.read())
            for adapter in folded:
                with upcast(adapter):
                    W, b = adapter.fold(W, b)
            if safe and not finite((W, b)):
                raise broken(folded[-1])
            base.write(W, b)
            if safe and not finite(base.current()):
                self._fold(innermost.folded, False)
                raise unfit(folded[-1])
        innermost.folded, innermost.fingerprints = folded, [adapter.fingerprint() for adapter in folded]
        innermost.register_backup()

    def check_acts(self) -> None:
        """Raise `MergeError` when the layer with adapters merged does something else than with them beside it.

        That may be where its class has a `forward` of its own.
        """
        innermost = self._innermost
        if not innermost.folded or (probe := innermost.base.probe()) is None:
            return
        op: Any = Unmerged(innermost.base)
        with torch.no_grad(), self.onloaded(), autocast_off(), ExitStack() as stack:
            for adapter in innermost.folded:
                stack.enter_context(upcast(adapter))
                op = Adapted(adapter, op)
            want, got = innermost.base.outcome(probe, op), innermost.base.outcome(probe)
        if want is not None and not near(got, want):
            path, kind = innermost.folded[-1].path, type(innermost.base.leaf).__name__
            raise MergeError(
                f"{path!r}, a {kind}, does something else with its weight than torch's own layers, so with an adapter "
                "in the weight it would not do what it does with the adapter beside it. Keep the adapter unmerged."
            )

    def check_folded(self, again: list[Adapter]) -> None:
        """Raise `MergeError` when one of `again`, which the weights hold, is not any more what was merged."""
        with self.onloaded():
            for adapter, then in zip(self.folded, self.fingerprints):
                now = adapter.fingerprint() if adapter in again else []
                if any(a[:-1] == b[:-1] and a != b for a, b in zip(then, now)):
                    raise MergeError(
                        f"Adapter {adapter.name} ({adapter.path!r}) was changed after it was merged, its values or its "
                        "scale, and the weights are made of all that is merged. Unmerge it first, and merge it again."
                    )

    def reshard(self) -> None:
        """Let FSDP2 hold the frozen weights in shards, as they are to be written."""
        if not sharded(self.base.stored()[0]):
            reshard(self.base.leaf)

    def register_backup(self) -> None:
        """Have, as a module, what the frozen weights were before a merge: it moves and is copied with the layer."""
        if self.base.backup is None:
            self._modules.pop("backup", None)
        else:
            self._modules["backup"] = self.base.backup

    def order_of(self, name: str) -> tuple[int, int]:
        """Where adapter `name` acts: how many layers are inside this one, and where among the active ones."""
        active = self._active_adapter
        return len(self.chain), active.index(name) if name in active else -1

    def _apply(self, fn: Any, recurse: bool = True) -> Layer:
        """As nn.Module does it; a cast of merged weights is not an edit of them."""
        base = self.base
        if base.backup is None:
            return super()._apply(fn, recurse)
        edited = base.edited
        super()._apply(fn, recurse)
        base.note_written()
        if edited:
            base.written = None
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self.check_loads(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_loads(self, state_dict: Any, prefix: str) -> None:
        """Raise `MergeError` when a state dict has weights for the frozen layer and adapters are merged into those."""
        if not self.chain[-1].folded:
            return
        own = f"{prefix}base_layer."
        if found := [key for key in state_dict if key.startswith(own) and self.base.is_stored(key.removeprefix(own))]:
            raise MergeError(
                f"{found[0]!r} cannot be loaded while {', '.join(self.merged_adapters) or 'an adapter'} is merged into "
                "it: unmerging would put the old weights back. Call `unmerge_adapter()` first, and merge again after "
                "loading."
            )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging `adapter` alone adds to the stored weight, in the weight's own layout."""
        with torch.no_grad(), autocast_off(), self.onloaded(), upcast(self.adapters[adapter]):
            W, b = upcast_pair(self.base.read())
            return self.base.canonical(self.adapters[adapter].fold(W, b)[0]) - self.base.canonical(W)

    # -------------------------------------------------------------------------------------------- which adapters run
    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        if self.merged_adapters:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", PeftWarning)
            self.unmerge()
        super().set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged_adapters:  # other modules may read the weights, without this layer being called
            self.unmerge()
        super().enable_adapters(enabled)

    def _train(self, name: str, on: bool) -> None:
        adapter = self.adapters[name]
        for slot in self.adapter_layer_names:
            if slot.startswith(adapter.prefix) and (value := contents(self._modules[slot]).get(name)) is not None:
                train = on and adapter.is_trainable(slot)
                for p in _parameters(value) if isinstance(value, nn.Module) else (value,):
                    if p is not None and p.requires_grad is not train and p.is_leaf:
                        p.requires_grad_(train)
        (self.trained.add if on else self.trained.discard)(name)

    def adopt(self, scratch: Layer, name: str) -> None:
        """Take over adapter `name`, built on a scratch layer around the same module."""
        adapter = scratch.adapters[name]
        for slot in scratch.adapter_layer_names + scratch.other_param_names:
            theirs, mine = scratch.contents(slot), self.contents(slot)
            if name in theirs and mine is None:
                box = scratch._modules.get(slot, theirs)
                self.register(slot, box, slot in scratch.adapter_layer_names)
            elif name in theirs and mine is not theirs:
                self.put(slot, name, theirs[name])
        self.shared_boxes.update(scratch.shared_boxes)
        adapter.move_to(self)
        self.adapters[name] = adapter

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; when it was active and alone, the first that is left becomes active.

        It may be active on a layer that it has no part in.
        """
        if adapter_name in self.merged_adapters:
            raise MergeError(f"Adapter {adapter_name} is merged; call `unmerge_adapter` before deleting it.")
        if self.adapters.pop(adapter_name, None) is not None:
            self.drop(adapter_name)
            self.trained.discard(adapter_name)
            self.paused.discard(adapter_name)
        if adapter_name in self._active_adapter:
            rest = [n for n in self._active_adapter if n != adapter_name]
            self.set_adapter(rest or sorted(self.adapters)[:1])

    def unwrapped(self, names: list[str]) -> nn.Module:
        self.base.forget()
        return self.base_layer

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapters)

    def train(self, mode: bool = True) -> Layer:
        """As nn.Module.train; the adapters, whose modules stand in boxes, are no children."""
        super().train(mode)
        for adapter in self.adapters.values():
            adapter.training = mode
        return self

    # ------------------------------------------------------------------------------ what other code reads off a layer
    def get_base_layer(self) -> nn.Module:
        """The frozen layer itself, also under several nested ones."""
        return self.base.leaf

    @property
    def weight(self) -> Tensor:
        weight = self.base.leaf.weight
        if self.weight_is_read and self._acts:
            W = self._read_alone()[0]
            return W["weight"] if isinstance(W, dict) else self.base.canonical(W).to(weight.dtype)
        if self.weight_is_read_fused and self._acts and not torch.overrides.has_torch_function_unary(weight):
            return weight.as_subclass(NotFused)
        return weight

    @property
    def bias(self) -> Tensor | None:
        if self.weight_is_read and self._acts:
            W, b = self._read_alone()
            return W.get("bias") if isinstance(W, dict) else b
        return self.base.leaf.bias

    @property
    def _acts(self) -> bool:
        """Whether calling the layer is something else than its weights say."""
        if self._disable_adapters or (mixed := self.context.now.adapter_names) is None:
            return bool(self.running)
        return not self.adapters.keys().isdisjoint(mixed)

    def _read_alone(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) with adapters, for code that reads them instead of calling the layer."""
        if self.context.now.adapter_names is not None:
            path = next(iter(self.adapters.values())).path
            raise BatchError(f"Mixed batches are not possible on {path!r}: its weight is read, it is not called.")
        return self.operator().read()

    @property
    def parameter_name(self) -> str:
        """Which parameter of the frozen layer is adapted."""
        return self.base.weight_name

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("base")
            if base is not None and base.forwards_attributes and not name.startswith("__") and name not in HOOKS:
                if base.needs_weights and name == "_qkv_same_embed_dim":  # its fused path would read the raw weights
                    return not self.running
                return getattr(self.base_layer, name)
            if name in self.unused.get(self.__dict__.get("method", ""), ()):
                return MappingProxyType({})
            raise

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times its own alpha / r (methods that have a scaling)."""
        if adapter in self._scaling():
            self._rescale(adapter, scale * self.adapters[adapter].initial_scaling())

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' scale (methods that have a scaling)."""
        for name in self._active_adapter:
            if name in self._scaling():
                self._rescale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters' scale by `scale`, or set it back to its own value."""
        for name in self._active_adapter:
            if name in self._scaling():
                self._rescale(name, self.scaling[name] / scale if scale else self.adapters[name].initial_scaling())

    def _rescale(self, name: str, value: Any) -> None:
        """A scaling that is a tensor, for hot swapping, stays the one that compiled code holds."""
        if isinstance(held := self.scaling[name], Tensor):
            held.fill_(value)
        else:
            self.scaling[name] = value

    def _scaling(self) -> dict[str, Any]:
        return self.__dict__.get("scaling", {})

    def _get_name(self) -> str:
        return f"{self.method.lower()}.{self.base.label}"


class NotFused(Tensor):
    """A frozen weight that is not all there is to a layer: torch's fused paths, which look for that, call the layer."""


class Inside:
    """A layer of another method as the operator inside: called as a module, read with its adapters in the weights."""

    def __init__(self, base: Base, layer: Any, names: Sequence[str] | None):
        self.base, self.layer, self.names = base, layer, names

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base(x, *args, **kwargs)

    def read(self) -> tuple[Any, Any]:
        return self.layer.operator(self.names).read()


class Unmerged:
    """A frozen layer as the operator that it was before adapters were merged into it."""

    def __init__(self, base: Base):
        self.base = base

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base.original(x, *args, **kwargs)

    def read(self) -> tuple[Any, Any]:
        return self.base.read()


# ----------------------------------------------------------------------------------------------------------- walking
def adapted(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(path, live path, module) of everything in a model that holds adapters."""
    for path, live, module in walk(model):
        if isinstance(module, HoldsAdapters):
            yield path, live, module


def layers(model: nn.Module) -> list[Layer]:
    """Every Layer of a model, outer ones first."""
    return [module for _, _, module in walk(model) if isinstance(module, Layer)]


def adapter_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules inside of what holds adapters that have their tensors."""
    for _, _, module in adapted(model):
        yield from (part for slot, part in module._modules.items() if slot != module.wraps)


# ----------------------------------------------------------------------------------------------------------- helpers
def _parameters(module: nn.Module) -> Iterable[nn.Parameter | None]:
    return module.parameters() if module._modules else module._parameters.values()
