"""Which tensors make an adapter's checkpoint, under which keys, and how they come into a model.

A saved key is the live key without the adapter's name, taken out of the one place where it stands: behind its slot.

    live    base_model.model.encoder.fc.lora_A.default.weight
    saved   base_model.model.encoder.fc.lora_A.weight
"""

from __future__ import annotations

import math
import warnings
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import adapter_class
from .errors import AdapterNameError, CheckpointError, PeftWarning, nearest
from .files import find_weights
from .layer import Layer, ModulesToSaveWrapper, adapted
from .offload import loaded, onload

READ_WHOLE = 2**26  # bytes: smaller files are read in one go, which takes half the time; larger ones bit by bit
PREFIX = "base_model.model."
LoadReport = namedtuple("LoadReport", ["missing_keys", "unexpected_keys"])


@dataclass
class Entry:
    """One tensor of a checkpoint: its saved key, its live key, and the dict it stands in now."""

    saved: str
    live: str
    box: Any
    key: str
    layer: Layer | None = None  # the layer that it belongs to, which says where a new tensor goes
    shared: bool = False  # True: earlier adapters may look at the same tensor, from elsewhere

    @property
    def tensor(self) -> Tensor:
        return self.box[self.key]

    def fill(self, value: Tensor) -> None:
        """Take over `value`. A tensor without storage (meta), or shared with other adapters, is replaced."""
        old, layer = self.tensor, self.layer
        if old.is_meta and not self.shared:
            new = value.detach().clone() if layer is None else layer.settle(value.detach(), copy=True)
            if not new.is_meta:  # as it is where the frozen layer is on the meta device too
                self.box[self.key] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        elif self.shared or any(tensor is old for key, tensor in self.box.items() if key != self.key):
            self.box[self.key] = own(old, value)
        else:
            with torch.no_grad():
                old.copy_(value)


def own(tensor: Tensor, value: Tensor) -> Tensor:
    """`tensor` if it holds `value` already, otherwise a copy of `value` in its dtype and on its device."""
    value = value.detach().to(tensor, copy=True)
    if torch.equal(tensor, value):
        return tensor
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def tensors_of_module(module: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """(path, box, key) of each parameter and persistent buffer of a module: it lies at `box[key]`."""
    for name, sub in module.named_modules() if module._modules else [("", module)]:
        for box, skip in ((sub._parameters, ()), (sub._buffers, sub._non_persistent_buffers_set)):
            for key, tensor in box.items():
                if tensor is not None and key not in skip:
                    yield f"{name}.{key}" if name else key, box, key


def entries_of_module(module: nn.Module, saved: str, live: str) -> Iterator[Entry]:
    """An entry for each parameter and persistent buffer of a module."""
    for path, box, key in tensors_of_module(module):
        yield Entry(f"{saved}.{path}", f"{live}.{path}", box, key)


def entries_of_layer(
    layer: Layer, name: str, path: str, skip: Iterable[str] = (), live: str | None = None
) -> Iterator[Entry]:
    """An entry for each saved tensor of adapter `name` on a layer, but not of the slots in `skip`.

    `path` is what saved keys call the layer, `live` what it is called in the model, if that is something else.
    """
    adapter, live = layer.adapters[name], path if live is None else live
    for slot, box, value in layer.boxes(name):
        if slot in skip or not adapter.keeps(slot, adapter.config):
            continue
        if isinstance(value, Tensor):
            inner = box._parameters if isinstance(box, nn.ParameterDict) else box._buffers
            yield Entry(f"{path}.{adapter.saved_key(slot, '')}", f"{live}.{slot}.{name}", inner, name, layer)
        else:
            for rest, inner, key in tensors_of_module(value):
                saved = f"{path}.{adapter.saved_key(slot, rest)}"
                yield Entry(saved, f"{live}.{slot}.{name}.{rest}", inner, key, layer)


def entries_of_shared(cls: Any, slot: str, name: str, value: Any, box: Any, key: str) -> Iterator[Entry]:
    """An entry for a tensor beside the model, at `box[key]`, or for each tensor of such a module."""
    saved, live = f"base_model.{cls.saved_key(slot, '')}", f"base_model.{slot}.{name}"
    if isinstance(value, Tensor):
        yield Entry(saved, live, box, key)
    else:
        yield from entries_of_module(value, saved, live)


def entries_of_model(model: Any, name: str) -> Iterator[Entry]:
    """An entry for each saved tensor of adapter `name` on a model, with the keys of that model."""
    tuner = tuner_of(model)
    inside = tuner is not None and tuner is not model
    root, prefix = (tuner.model, PREFIX) if inside else (getattr(tuner, "model", model), "")
    if tuner is model:  # a bare tuner: its keys lack the first segment only
        prefix = "model."
    begin = prefix.removesuffix("model.") + f"{tuner.root}." if prefix and tuner is not None else prefix
    config = model.peft_config[name]
    cls = adapter_class(config)
    shared = {} if tuner is None else tuner.shared_slots()
    for slot, box in shared.items():
        if name in box and cls.keeps(slot, config):
            inner = box._parameters if isinstance(box, nn.ParameterDict) else box._buffers
            yield from entries_of_shared(cls, slot, name, box[name], inner, name)
    for _, live, module in adapted(root):
        if isinstance(module, Layer) and name in module.adapters:
            if not module.tied:
                yield from entries_of_layer(module, name, prefix + live, shared, begin + live)
        elif isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            yield from entries_of_module(
                module.modules_to_save[name], prefix + live, f"{prefix}{live}.modules_to_save.{name}"
            )
    if tuner is not None:
        yield from tuner.further_entries(name, prefix)


def tuner_of(model: nn.Module) -> Any:
    """The tuner of a PeftModel, or the tuner itself, or None for a model with injected adapters."""
    from .tuner import BaseTuner

    if isinstance(model, BaseTuner):
        return model
    inner = vars(model).get("_modules", {}).get("base_model")
    return inner if isinstance(inner, BaseTuner) else None


# ---------------------------------------------------------------------------------------------------------- checking
def strip(key: str) -> str:
    """A key without the prefix that a PeftModel puts before the names of its base model."""
    return key.removeprefix(PREFIX)


def check(
    entries: list[Entry],
    weights: Mapping[str, Tensor],
    extra: Iterable[str] = (),
    strict: bool = True,
    stored: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Compare a checkpoint with the tensors that it is to fill; nothing is changed.

    Raises `CheckpointError` naming missing, unexpected, misshapen and non-finite tensors. With `strict=False` missing
    and unexpected ones are only warned about. `extra` are keys that may be there besides; `stored` is what the file has
    where a method made `weights` out of it.
    """
    wanted = {strip(entry.saved): entry for entry in entries}
    given = {strip(key): tensor for key, tensor in weights.items()}
    missing = sorted(wanted.keys() - given.keys())
    unexpected = sorted(given.keys() - wanted.keys() - {strip(key) for key in extra})
    shapes = [
        f"{key}: {tuple(given[key].shape)} in the checkpoint, {tuple(entry.tensor.shape)} in the model"
        for key, entry in wanted.items()
        if key in given and given[key].shape != entry.tensor.shape
    ]
    stored = weights if stored is None else stored
    broken = [strip(key) for key, t in stored.items() if t.is_floating_point() and not _finite(t)]
    faults = []
    for title, keys, known in (("missing", missing, given), ("unexpected", unexpected, wanted)):
        if keys:
            shown = "; ".join(f"{key}{nearest(key, set(known) - set(keys), 1)}" for key in keys[:5])
            faults.append(f"{len(keys)} {title} tensor(s): {shown}" + (" ..." if len(keys) > 5 else ""))
    if faults and not strict:
        warnings.warn("The checkpoint does not fit the model. " + " | ".join(faults), PeftWarning)
        faults = []
    if shapes:
        faults.append(f"{len(shapes)} tensor(s) of another shape: " + "; ".join(shapes[:5]))
    if broken:
        faults.append(f"{len(broken)} tensor(s) with NaN or infinite values: " + ", ".join(broken[:5]))
    if faults:
        raise CheckpointError("The checkpoint does not fit the model; nothing was loaded. " + " | ".join(faults))
    return LoadReport(missing, unexpected)


def fill(entries: Iterable[Entry], weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's tensors into those entries that it has; the others keep what they have."""
    given = {strip(key): tensor for key, tensor in weights.items()}
    for entry in entries:
        if (value := given.get(strip(entry.saved))) is not None:
            entry.fill(value)


def _finite(t: Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum tells it, and so soon; a sum that overflows does not."""
    t = t.float() if t.dtype.itemsize == 1 else t  # float8 cannot be added up
    return math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all())


# -------------------------------------------------------------------------------------------------- reading, writing
def read_weights(model_id: Any, device: Any = None, **options: Any) -> dict[str, Tensor]:
    """The tensors of a saved adapter. Raises `CheckpointError` when the file cannot be read as what it claims to be."""
    return read_weights_file(find_weights(model_id, **options), device)


def read_weights_file(path: Path, device: Any = None) -> dict[str, Tensor]:
    """The tensors in a file: a pickle of tensors if its name ends with `.bin`, otherwise safetensors."""
    device = str(device) if device is not None else "cpu"
    if path.suffix == ".bin":
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"'{path}' cannot be read as a pickle of tensors: {error}") from error
    from safetensors.torch import load, load_file

    try:
        if device == "cpu" and path.stat().st_size <= READ_WHOLE:
            return load(path.read_bytes())
        return load_file(path, device=device)
    except Exception as error:
        with open(path, "rb") as file:
            head = file.read(4)
        hint = " It looks like a pickle." if head[:1] == b"\x80" or head[:2] == b"PK" else ""
        hint = " It is empty." if not head else hint
        raise CheckpointError(f"'{path}' is not a complete safetensors file ({error}).{hint}") from error


def serialiser(tensors: Mapping[str, Tensor], safe: bool = True) -> Any:
    """A function from metadata to the bytes of a weights file: safetensors, or with `safe=False` a pickle."""

    def to_bytes(metadata: dict[str, str]) -> bytes:
        if not safe:
            import io

            buffer = io.BytesIO()
            torch.save(dict(tensors), buffer)
            return buffer.getvalue()
        from safetensors.torch import save

        own, seen = {}, set()
        for key, tensor in tensors.items():  # safetensors takes neither views nor shared memory
            if hasattr(tensor, "full_tensor"):  # a DTensor
                how = "get_model_state_dict(..., options=StateDictOptions(full_state_dict=True)) of torch gives it"
                raise CheckpointError(f"'{key}' is sharded over processes: pass the full `state_dict=`; {how}.")
            tensor = tensor.detach().contiguous()
            place = (tensor.device, tensor.untyped_storage().data_ptr())
            own[key] = tensor.clone() if place in seen or tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
            seen.add(place)
        return save(own, metadata)

    return to_bytes


def load_peft_weights(
    model_id: Any,
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter, by saved key.

    `key_mapping` (regular expression -> replacement) renames the modules that the keys speak of; the first pattern that
    fits a key is applied. Further options go to the hub's download.
    """
    import re

    weights = read_weights(model_id, device or infer_device(), **hf_hub_download_kwargs)
    if not key_mapping:
        return weights
    renamed = {}
    for key, tensor in weights.items():
        head = PREFIX if key.startswith(PREFIX) else "base_model." if key.startswith("base_model.") else ""
        body = key[len(head) :]
        for pattern, replacement in key_mapping.items():
            body, count = re.subn(pattern, replacement, body)
            if count:
                break
        renamed[head + body] = tensor
    return renamed


def infer_device() -> str:
    """The accelerator that is there, by name, or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    for name in ("xpu", "npu", "mlu"):
        if (device := getattr(torch, name, None)) is not None and device.is_available():
            return name
    return "cpu"


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter's checkpoint, by saved key.

    `state_dict`: take the tensors from there, by live key, instead of from the model (FSDP, DeepSpeed).
    `unwrap_compiled`: look inside torch.compile's wrapper. `save_embedding_layers`: also the whole embedding and output
    layers; "auto" when they are targeted or the vocabulary was resized.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    if adapter_name not in model.peft_config:
        raise AdapterNameError(f"Adapter {adapter_name} not found; this model has {sorted(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        from .prompt import prompt_state

        saved, copies = prompt_state(model, adapter_name), list(_copies(model, adapter_name, "base_model."))
        with onloaded(model, copies):
            return saved | {e.saved: e.tensor.detach() for e in copies}
    saved = {}
    entries = list(entries_of_model(model, adapter_name))
    with onloaded(model, entries if state_dict is None else ()):
        for entry in entries:
            if state_dict is None:
                saved[entry.saved] = entry.tensor.detach()
            elif entry.live in state_dict:
                saved[entry.saved] = state_dict[entry.live]
            else:
                raise CheckpointError(f"`state_dict` lacks '{entry.live}', which belongs to adapter {adapter_name!r}.")
    saved = adapter_class(config).convert_for_save(model, adapter_name, saved)
    for key, tensor in _bias_tensors(model, adapter_name).items():
        saved.setdefault(key, tensor if state_dict is None else state_dict[key])
    for key, tensor in _embedding_tensors(model, config, save_embedding_layers).items():
        saved.setdefault(key, tensor if state_dict is None else state_dict[key])
    return saved


def onloaded(model: nn.Module, entries: Iterable[Entry], keep: bool = False) -> AbstractContextManager[None]:
    """While it is open, offloaded tensors of entries are where they run; see `onload`."""
    boxes = {id(entry.box) for entry in entries}
    holding = [m for m in model.modules() if id(m._parameters) in boxes or id(m._buffers) in boxes]
    return onload(*holding, keep=keep, recurse=False)


def _copies(model: Any, name: str, prefix: str) -> Iterator[Entry]:
    for _, live, module in adapted(model.base_model):
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            yield from entries_of_module(
                module.modules_to_save[name], prefix + live, f"{prefix}{live}.modules_to_save.{name}"
            )


def _bias_tensors(model: Any, name: str) -> dict[str, Tensor]:
    tuner = tuner_of(model)
    if tuner is None or tuner.bias_owner != name:
        return {}
    prefix = "" if tuner is model else "base_model."
    return {f"{prefix}model.{key}": tuner.trained_bias(key) for key in tuner.biases}


def _embedding_tensors(model: Any, config: Any, save: bool | str) -> dict[str, Tensor]:
    """The embedding and output layers, when they are to be saved whole."""
    from .targets import EMBEDDINGS, named

    root = getattr(tuner_of(model), "model", model)
    targets: Any = getattr(config, "target_modules", None)
    targeted = bool(targets) and (
        any(name in targets for name in EMBEDDINGS)
        if not isinstance(targets, str)
        else any(named(path, targets) for path, _, _ in adapted(root) if path.rpartition(".")[2] in EMBEDDINGS)
    )
    tokens = config.peft_type == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None) is not None
    if save == "auto":
        save = targeted and not tokens
        if save:
            why = "embedding layers found in `target_modules`"
            warnings.warn(f"Setting `save_embedding_layers` to `True` as {why}.", PeftWarning)
        elif resized(root, config):
            save = True
            why = "the embedding layer has been resized"
            warnings.warn(f"Setting `save_embedding_layers` to `True` as {why}.", PeftWarning)
    if not save:
        return {}
    if not hasattr(root, "get_input_embeddings"):
        warnings.warn("Could not identify embedding layer(s): the model has no `get_input_embeddings`.", PeftWarning)
        return {}
    prefix = "" if root is model else PREFIX
    names = {id(m): n for n, m in root.named_modules()}
    found: dict[str, Tensor] = {}
    for layer in (root.get_input_embeddings(), root.get_output_embeddings()):
        if isinstance(layer, Layer) or (layer is not None and not targeted):
            leaf = layer.get_base_layer() if isinstance(layer, Layer) else layer
            with loaded(leaf):
                found |= {f"{prefix}{names[id(leaf)]}.{k}": t.detach() for k, t in leaf.state_dict().items()}
    return found


def resized(root: nn.Module, config: Any) -> bool:
    """Whether the vocabulary differs from that of the base model's local folder."""
    import json
    import os

    path = os.path.join(config.base_model_name_or_path or "", "config.json")
    own = getattr(getattr(root, "config", None), "vocab_size", None)
    if own is None or not config.base_model_name_or_path or not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("vocab_size", own) != own


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Write a checkpoint's tensors into an adapter that the model has already.

    Raises `CheckpointError`, with nothing written, when tensors are missing, unexpected, misshapen or not finite;
    `strict=False` warns about the first two. `ignore_mismatched_sizes` leaves misshapen ones out with a warning.
    """
    if adapter_name not in model.peft_config:
        raise AdapterNameError(f"Adapter {adapter_name} not found; this model has {sorted(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        from .prompt import load_prompt_state

        return load_prompt_state(model, adapter_name, peft_model_state_dict, strict)
    weights = adapter_class(config).convert_for_load(config, dict(peft_model_state_dict))
    undo = adapter_class(config).resize(model, adapter_name, weights)
    try:
        entries = list(entries_of_model(model, adapter_name))
        base = base_entries(model, weights)
        if ignore_mismatched_sizes:
            shapes = {strip(e.saved): e.tensor.shape for e in entries}
            wrong = [k for k, t in weights.items() if shapes.get(strip(k), t.shape) != t.shape]
            if wrong:
                warnings.warn(f"Left out, because of another shape (ignore_mismatched_sizes): {wrong}.", PeftWarning)
                weights = {k: t for k, t in weights.items() if k not in wrong}
                entries = [e for e in entries if strip(e.saved) not in {strip(k) for k in wrong}]
        have = {strip(e.saved) for e in entries}
        entries += [e for e in _bias_entries(model, adapter_name) if strip(e.saved) not in have]
        report = check(entries, weights, [e.saved for e in base], strict, peft_model_state_dict)
    except BaseException:
        if undo is not None:
            undo()
        raise
    with onloaded(model, entries + base, keep=True):
        fill(entries + base, weights)
    for _, _, module in adapted(getattr(tuner_of(model), "model", model)):
        if isinstance(module, Layer) and adapter_name in module.adapters:
            module.adapters[adapter_name].loaded()
    return report


def _bias_entries(model: Any, name: str) -> list[Entry]:
    tuner = tuner_of(model)
    if tuner is None or tuner.bias_owner != name:
        return []
    prefix = "" if tuner is model else "base_model."
    return [Entry(f"{prefix}model.{k}", k, {k: tuner.trained_bias(k)}, k) for k in tuner.biases]


def base_entries(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Entry]:
    """Entries for whole embedding and output layers that a checkpoint holds beside the adapter."""
    root = getattr(tuner_of(model), "model", model)
    found = []
    layers = [getattr(root, get)() for get in ("get_input_embeddings", "get_output_embeddings") if hasattr(root, get)]
    leaves = {id(m.get_base_layer() if isinstance(m, Layer) else m) for m in layers if m is not None}
    for name, module in root.named_modules() if leaves else ():
        if id(module) in leaves:
            for key in module._parameters:
                for saved in {f"{name}.{key}", f"{name.removesuffix('.base_layer')}.base_layer.{key}"}:
                    if saved in weights or PREFIX + saved in weights:
                        found.append(Entry(PREFIX + saved, saved, module._parameters, key))
    return found
