"""Building one adapter beside a model, checking it, and putting it into the model in one go.

Until `Plan.commit` nothing of the model is touched, so whatever fails before leaves the model as it was.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapter import unsupported
from .bases import Attention, Block, Conv1D, Linear, Whole
from .batch import BASE
from .config import check_config
from .errors import AdapterNameError, ConfigError, NoMatchingPeftModuleError, NotIncludedError, PeftWarning
from .kinds import base_of
from .layer import BufferDict, Layer
from .offload import loaded, onload
from .patterns import in_layer_path, matches
from .reads import is_read
from .state import (
    PREFIX,
    Entry,
    LoadReport,
    check,
    entries_of_layer,
    entries_of_shared,
    fill,
    fitted,
    strip,
    unwrapped,
    without_module,
)
from .stored import memory, users_of
from .targets import ALL_LINEAR, Targets, all_linear, suffixes, unmatched, warn_unmatched
from .walk import PlainNames, other_names, place_of, walk

if TYPE_CHECKING:
    from .tuner import Tuner

NO_CONFIG = {"model_type": "custom"}  # stands for the configuration of a model that has none
CONFUSED = (
    "That works here, but code that looks for adapters by parts of keys, peft among it, may confuse the two."
)
LONGEST = 255  # bytes of a folder's name, on the file systems in use
WHOLE_MODEL = ("modules_to_save", "trainable_token_indices", "bias", "ensure_weight_tying")  # fields for model/plan.py
RESERVED = frozenset(name for box in (nn.ModuleDict(), nn.ParameterDict(), BufferDict()) for name in dir(box))


def model_config(model: nn.Module) -> dict[str, Any]:
    """A model's own configuration as a dict; `{"model_type": "custom"}` when it has none."""
    config = getattr(model, "config", NO_CONFIG)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return config if isinstance(config, dict) else dict(vars(config))


def of_transformers(module: nn.Module) -> bool:
    """Whether a module is one of transformers' models; finding out does not import transformers."""
    kinds = [(kind.__name__, kind.__module__.split(".")[0]) for kind in type(module).__mro__]
    return ("PreTrainedModel", "transformers") in kinds


def check_adapter_name(name: Any, model: nn.Module | None = None) -> None:
    """Raise `AdapterNameError` unless `name` can be a key of a module dict, a part of a key and a folder."""
    if not isinstance(name, str):
        raise AdapterNameError(f"An adapter name must be a string, got {name!r}.")
    if not name or name == BASE or re.search(r"[./\\\x00]", name):
        raise AdapterNameError(
            f"{name!r} cannot be an adapter name: it must be non-empty, without '.', '/' and '\\', and not '{BASE}'."
        )
    if len(name.encode(errors="surrogatepass")) > LONGEST or re.search("[\ud800-\udfff]", name):
        raise AdapterNameError(
            f"{name[:40]!r}... cannot be an adapter name: it must be the name of a folder, which is text of at most "
            f"{LONGEST} bytes."
        )
    if name in RESERVED:
        raise AdapterNameError(f"{name!r} cannot be an adapter name: it is an attribute of torch's module containers.")
    if model is not None and name != "default":
        for path, _, _ in walk(model):
            if name in path.split("."):
                warnings.warn(
                    f"The model has a module that is named {name!r} like the adapter ('{path}'). {CONFUSED}",
                    PeftWarning,
                )
                return


class Undrawn(TorchFunctionMode):
    """While it is open, initial values are not drawn: on the meta device that takes long and does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **kwargs)


class Plan:
    """One adapter, built beside a model and ready to be put into it."""

    def __init__(
        self,
        tuner: Tuner,
        name: str,
        config: Any,
        loading: bool = False,
        empty: bool = False,
        autocast: bool = False,
        keys: Any = None,
    ):
        check_config(config)
        tuner.check_name(name)
        self.tuner, self.model, self.name, self.config = tuner, tuner.model, name, config
        self.cls = tuner.adapter_class(config)
        if name in getattr(self.cls, "prefix", ""):
            warnings.warn(
                f"Adapter name {name!r} is contained in {self.cls.prefix!r}, with which the keys of the method begin. "
                f"{CONFUSED}",
                PeftWarning,
            )
        self.autocast = autocast and "Whole" not in self.cls.bases  # a copy of a module keeps its dtype
        self.loading = loading
        self.empty = empty
        self.new: list[tuple[str, Layer, Layer | None]] = []  # live path, scratch layer, the layer it comes on
        self.newest: dict[str, Layer] = {}  # of `new`, the last scratch layer at each live path
        self.base_values: list[tuple[Entry, Tensor]] = []  # the model's own tensors to write in the end
        self.seen: list[nn.Module] = []  # every module of the model, without those of adapters
        self.live_paths: dict[int, str] = {}
        self.holders: list[Any] = []  # once it is in place: everything that holds the adapter
        self.parents: dict[str, nn.Module] = {}  # live path, module: those met so far while putting things in place
        others = {n: c for n, c in tuner.peft_config.items() if c is not config}
        self.set_present_names()
        self.check_beside(others)
        self.undo = self.cls.prepare(config, self.model)
        try:
            found = self.find(keys)
            with onload(*tuner.shared_slots().values()):
                self.shared = self.cls.share(config, [(path, base) for path, _, _, base in found], tuner.shared)
            self.extra_modules = self.cls.extra_modules(config, self.model)
            for path, live, module, base in found:
                self.build(path, live, module, base)
            self.cls.after_build(config, [scratch.adapters[name] for _, scratch, _ in self.new])
            self.build_further()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Leave the model as it was before."""
        if self.undo is not None:
            self.undo()
            self.undo = None

    # ------------------------------------------------------------------------------------- what whole models add to it
    def check_beside(self, others: dict[str, Any]) -> None:
        """Refuse the configuration beside those of other adapters, by name."""
        asked = {field: getattr(self.config, field, None) for field in WHOLE_MODEL}
        if further := [field for field, value in asked.items() if value not in (None, False, "none", [], ())]:
            what = f"{', '.join(further)} change more of a model than its layers: use get_peft_model"
            raise NotIncludedError(f"{what}, or leave them out.")
        self.cls.check_beside(self.config, others)

    def set_present_names(self) -> None:
        """Let a configuration that speaks of an older form of the model speak of what it has now."""

    def set_default_targets(self) -> None:
        """Complete a configuration that says nothing of what to adapt."""
        names = ("target_modules", "target_parameters")
        if not hasattr(self.config, names[0]):
            raise NotIncludedError(f"{self.cls.method.value} adapts whole models, not layers: use PeftModel.")
        if not any(getattr(self.config, name, None) for name in names):
            raise ConfigError("`target_modules` must say which layers to adapt, for example ['q_proj', 'v_proj'].")

    def tie(self) -> None:
        """Complete the configuration for layers that share a weight with the input embedding."""

    def ordered(self, paths: list[str]) -> list[str]:
        """The paths of layers to adapt, in the order in which they are built."""
        return paths

    def build_further(self) -> None:
        """Build what the configuration asks for beside layers."""

    # ------------------------------------------------------------------------------------------------------- finding
    def others(self) -> dict[str, str]:
        """Further paths of the modules that the model has in several places."""
        return other_names(self.model)

    def find(self, keys: Any) -> list[tuple[str, str, nn.Module, Any]]:
        """(path, live path, module, base) of every layer to adapt."""
        config: Any = self.config
        cls = self.cls
        outer: dict[str, tuple[str, nn.Module]] = {}
        for path, live, module in walk(self.model):
            self.seen.append(module)
            outer.setdefault(path, (live, module))
            self.live_paths[id(module)] = live
        self.set_default_targets()
        if isinstance(getattr(config, "target_modules", None), str) and config.target_modules.lower() == ALL_LINEAR:
            bases = [(path, base_of(module)) for path, (_, module) in outer.items() if path]
            config.target_modules = all_linear(self.model, config.task_type, bases)
        self.tie()
        targets = Targets(config)
        self.modules = [path for path in outer if path in targets]
        if keys is not None:
            self.modules = _paths_in(keys, cls.prefix, outer)
        self.modules = self.ordered(self.modules)
        whole = next((kind for kind in (Whole, Block) if kind.__name__ in cls.bases), None)
        fits: dict[type, bool] = {}  # kinds of base met so far
        found: list[tuple[str, str, nn.Module, Any]] = []
        wanted = set(self.modules)
        for path in self.modules:
            live, module = outer[path]
            parent = path.rpartition(".")[0]
            if parent in wanted and isinstance(base_of(outer[parent][1]), Attention):
                continue  # the out_proj of an attention module comes with it
            base: Any = base_of(module, whole=whole)
            kind = type(base)
            if kind not in fits:
                fits[kind] = base is not None and cls.fits(base)
            if not fits[kind]:
                raise unsupported(cls, module, path)
            cls.for_base(base).check_layer(config, path, base)
            found.append((path, live, module, base))
            if isinstance(base, Attention):
                out = base.leaf.out_proj
                found.append((path, f"{live}.base_layer.out_proj", out, base_of(out)))
        parameters = self.find_parameters(outer)
        for *_, base in found if hasattr(config, "fan_in_fan_out") else ():
            if isinstance(base, Linear) and config.fan_in_fan_out != isinstance(base, Conv1D):
                config.fan_in_fan_out = isinstance(base, Conv1D)
                value = config.fan_in_fan_out
                warnings.warn(f"fan_in_fan_out set to {value}, as the layers are {base.label}.", PeftWarning)
        self.parameters = [path for path, *_ in parameters]
        if keys is not None:  # which do not tell a layer from its parameter
            of_parameters = {path.rpartition(".")[0] for path in self.parameters}
            self.modules = [path for path in self.modules if path not in of_parameters]
            found = [one for one in found if one[0] not in of_parameters]
        targets.check(self.modules + self.parameters, list(outer), self.others, lambda: stacked(outer))
        if targets.exclude and not targets.excluded:
            warnings.warn(f"exclude_modules={targets.exclude!r} did not exclude anything.", PeftWarning)
        paths = self.modules + self.parameters
        for name, keys in vars(config).items():
            if name.endswith("_pattern") and isinstance(keys, dict):
                met = lambda key: any(matches(in_layer_path(key), p) or key.startswith(p + ".") for p in paths)
                if unused := [key for key in keys if not met(key)]:
                    warnings.warn(f"{name} keys {unused} fit no adapted layer and were ignored.", PeftWarning)
        return found + parameters

    def find_parameters(self, outer: dict[str, tuple[str, nn.Module]]) -> list[tuple[str, str, nn.Module, Any]]:
        """The same for `target_parameters`."""
        wanted = set(getattr(self.config, "target_parameters", None) or ())
        found, met, names = [], set(), []
        for path, (live, module) in outer.items() if wanted else ():
            leaf = module.base.leaf if isinstance(module, Layer) else module
            for name, _ in leaf.named_parameters(recurse=False):
                names.append(f"{path}.{name}" if path else name)
                if not (hits := wanted & set(suffixes(names[-1]))):
                    continue
                if not path:
                    why = "is a parameter of the outermost module; it cannot be adapted"
                    raise NoMatchingPeftModuleError(f"'{name}' {why}.")
                met |= hits
                base: Any = base_of(module, name)
                if not self.cls.fits(base):
                    raise unsupported(self.cls, module, names[-1])
                self.cls.for_base(base).check_layer(self.config, names[-1], base)
                found.append((names[-1], live, module, base))
        hint = unmatched(wanted - met, names, [], self.others)
        if hint and not (found or self.modules):
            raise NoMatchingPeftModuleError(f"Nothing to adapt: none of target_parameters is in the model. {hint}")
        warn_unmatched("target_parameters", hint)
        return found

    # ------------------------------------------------------------------------------------------------------ building
    def build(self, path: str, live: str, module: nn.Module, base: Any) -> None:
        """Build the adapter for one layer, on a scratch layer."""
        existing: Any = module
        while isinstance(existing, Layer) and existing.method == self.cls.method.value and not existing.base.same(base):
            existing = existing.base_layer  # for another parameter of the same module
        if isinstance(existing, Layer) and existing.method == self.cls.method.value:
            module, base = existing.base_layer, existing.base
        else:
            existing = None
            if live in self.newest:  # a further parameter of the same module: around the layer for the one before
                module, base = self.newest[live], base_of(self.newest[live], base.weight_name)
        if isinstance(base, Attention) and existing is None:  # PEFT: the initial values of out_proj are drawn twice
            self.scratch(base.leaf.out_proj, base_of(base.leaf.out_proj), path, self.cls, self.config)
        scratch = self.scratch(module, base, path, self.cls, self.config)
        self.new.append((live, scratch, existing))
        self.newest[live] = scratch

    def scratch(self, module: nn.Module, base: Any, path: str, cls: Any, config: Any) -> Layer:
        """A layer around `module` with the one new adapter, not yet part of the model."""
        with loaded(module):
            return self._scratch(module, base, path, cls, config)

    def _scratch(self, module: nn.Module, base: Any, path: str, cls: Any, config: Any) -> Layer:
        scratch = Layer(module, base, cls.method.value, self.tuner.context)
        on_meta = self.empty or base.device.type == "meta"
        vars(scratch).update(on_meta=on_meta, autocast=self.autocast)
        adapter = cls.for_base(base)(scratch, self.name, config, path)
        scratch.adapters[self.name] = adapter
        for slot, value in self.shared.items() if cls is self.cls else ():
            if (mine := _own_slot(cls, slot, path)) == slot:
                scratch.put(slot, self.name, value)
            elif mine:
                vars(scratch)[mine] = {self.name: value}
        if on_meta and (base.device.type == "meta" or not adapter.changes_base(config)):
            adapter.base = base.shapes_only()
            with torch.device("meta"), Undrawn():
                adapter.build()
            adapter.base = base
        else:
            adapter.build()
            if on_meta:
                adapter.to("meta")
        scratch.cast_adapter_to_base(self.name)
        return scratch

    # ------------------------------------------------------------------------------------------------------- loading
    def entries(self) -> Iterator[Entry]:
        """The tensors that a checkpoint of this adapter holds, where they are now, under the keys they will have."""
        names = PlainNames(self.model)
        around = Counter(live for live, _, existing in self.new if existing is None)  # layers that come to stand there
        for live, scratch, existing in self.new:
            if existing is not None:
                where = self.live_paths[id(existing)]
            else:
                around[live] -= 1
                where = live + ".base_layer" * around[live]
            yield from entries_of_layer(scratch, self.name, PREFIX + names(where), skip=self.shared)
        for slot, value in self.shared.items():
            if self.cls.is_saved(slot, self.config):
                for entry in entries_of_shared(self.cls, slot, self.name, value, self.shared, slot, self.shared):
                    entry.shared = entry.box is self.shared
                    yield entry
        for slot, module in self.extra_modules.items():
            yield from entries_of_shared(self.cls, slot, self.name, module, self.extra_modules, slot, self.shared)

    def load(self, weights: Mapping[str, Tensor], strict: bool = True, ignore: bool = False) -> LoadReport:
        """Fill the adapter with a checkpoint's tensors, as `incoming` gives them. Raises `CheckpointError`.

        `strict` and `ignore` as for `checkpoint.check`.
        """
        entries = list(self.entries())
        stored, weights = weights, self.fitted(entries, self.cls.convert_for_load(self.config, dict(weights)))
        later, again = self.entries_of_base(entries, weights)
        report = check(entries + later, weights, again, strict, stored, ignore)
        fill(entries, weights)
        given = {strip(key): tensor for key, tensor in weights.items()} if later else {}
        for entry in later:
            value = given.get(strip(entry.saved))
            if value is not None and value.shape == entry.tensor.shape:
                self.base_values.append((entry, value))
        return report

    def fitted(self, entries: list[Entry], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors under the keys of the entries, where only wrappers' names differ."""
        return fitted(entries, weights)

    def entries_of_base(self, entries: list[Entry], weights: dict[str, Tensor]) -> tuple[list[Entry], list[str]]:
        """Entries for the model's own tensors that a checkpoint holds beside the adapter's; keys that it says twice."""
        return [], []

    @property
    def built(self) -> list[tuple[str, Layer, Layer | None]]:
        """(live path, scratch layer, the layer it comes on) of everything that was built."""
        return self.new

    def incomplete(self, report: LoadReport) -> bool:
        """Whether some tensor has no values after `load`: the checkpoint lacked it, or such tensors are never saved."""
        built = [(scratch, scratch.adapters[self.name]) for _, scratch, _ in self.built]
        slots = {(type(adapter), slot) for scratch, adapter in built for slot in scratch._modules}
        if not report.missing_keys and all(s == "base_layer" or cls.is_saved(s, self.config) for cls, s in slots):
            return False
        return any(
            tensor.is_meta and scratch.base.device.type != "meta"
            for scratch, _ in built
            for _, tensor in scratch.tensors(self.name)
        )

    # ----------------------------------------------------------------------------------------------- putting in place
    def commit(self) -> None:
        """Put everything in place."""
        tuner, name = self.tuner, self.name
        for slot, value in self.shared.items():
            tuner.put(slot, name, value, persistent=self.cls.is_saved(slot, self.config))
        for slot, module in self.extra_modules.items():
            tuner.put(slot, name, module.train(tuner.training))
        self.untie()
        for live, scratch, existing in self.new:
            adapter = scratch.adapters[name]
            for slot in self.shared:
                if (mine := _own_slot(self.cls, slot, adapter.path)) is not None:
                    box = scratch.shared_boxes[slot] = tuner.shared(slot)
                    holder = scratch._modules if mine == slot else vars(scratch)
                    holder.pop(mine, None)  # PEFT: what is shared stands behind the layer's own
                    holder[mine] = box
            if self.shared:
                adapter.move_to(scratch)
            if scratch.on_commit:
                with scratch.onloaded(keep=True):
                    for action in scratch.on_commit:
                        action()
            scratch.on_commit.clear()
            if existing is not None:
                existing.adopt(scratch, name)
            else:
                self._set(live, scratch)
            self.holders.append(existing or scratch)

    def untie(self) -> None:
        """Let layers whose frozen weight changes have it for themselves, where modules without the adapter use it."""
        new = [scratch for _, scratch, _ in self.new if scratch.adapters[self.name].changes_base(self.config)]
        mine = {scratch.base.leaf for scratch in new}
        users = users_of(self.seen) if new else {}
        for scratch in new:
            if users.get(memory(scratch.base.innermost.stored()[0]), set()) - mine:
                path = scratch.adapters[self.name].path
                scratch.base.innermost.shares_weight = True
                warnings.warn(f"The start changes the weight of '{path}', so it is untied from others.", PeftWarning)

    def finish(self) -> None:
        """Write what a checkpoint holds for the model's own tensors: biases, and whole embedding layers."""
        for entry, value in self.base_values:
            entry.fill(value)

    def _set(self, live: str, module: nn.Module) -> None:
        head, _, last = place_of(live).rpartition(".")
        parent = self.parents.get(head)
        if parent is None:
            parent = self.parents[head] = self.model.get_submodule(head)
        parent._modules[last] = module
        if isinstance(module, Layer):
            module.weight_is_read_fused = isinstance(parent, nn.TransformerEncoderLayer)
            plain = module.base.weight_name == "weight" and not (module.base.packed or module.weight_is_read_fused)
            module.weight_is_read = plain and is_read(self.model, place_of(live))


def stacked(outer: dict[str, tuple[str, nn.Module]]) -> list[str]:
    """Names, for `target_parameters`, of what may be the weights of experts: 3-D parameters that are no layer's."""
    names = []
    for path, (_, module) in outer.items():
        for name, parameter in module._parameters.items() if path else ():
            if parameter is not None and parameter.dim() == 3 and len(parameter) > 1 and base_of(module) is None:
                names.append(f"{path.rpartition('.')[2]}.{name}")
    return list(dict.fromkeys(names))


def _own_slot(cls: Any, slot: str, path: str) -> str | None:
    """Under which name the layer at `path` looks at a shared slot, or None: it belongs to another group."""
    head, _, group = slot.partition(".")
    return head if group in ("", cls.group(path)) else None


def _paths_in(keys: Any, prefix: str, outer: dict[str, Any]) -> list[str]:
    """The modules that the keys of a checkpoint speak of: whatever stands before a slot of the method."""
    heads = {strip(unwrapped(key)).rsplit(f".{prefix}", 1)[0] for key in keys}
    others = {without_module(head) for head in heads if head not in outer}
    return [path for path in outer if path in heads or (path and without_module(path) in others)]
