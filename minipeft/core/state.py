"""Which tensors make an adapter's checkpoint, under which keys, and how they come into a model.

A saved key is the live key without the adapter's name, taken out of the one place where it stands: behind its slot.

    live    base_model.model.encoder.fc.lora_A.default.weight
    saved   base_model.model.encoder.fc.lora_A.weight
"""

from __future__ import annotations

import io
import math
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import adapter_class
from .config import sizes
from .errors import CheckpointError, PeftWarning, cut, nearest, shown
from .files import PICKLE, find_weights, look, of_one_version
from .layer import Layer, adapted, layers
from .offload import onload
from .walk import WRAPPERS, PlainNames

READ_WHOLE = 2**23  # bytes: smaller files are read in one go, which is faster; larger ones are mapped, not copied
SAFE_PICKLES = (2, 6)  # the first torch whose `weights_only` lets no pickle run code
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
    frozen: bool = False  # True: it is not the adapter's but the model's own, and the checkpoint says so
    index_bound: Any = None  # of a tensor of positions: each is smaller than this; or a bound for each of its rows

    @property
    def tensor(self) -> Tensor:
        return self.box[self.key]

    def fill(self, value: Tensor) -> None:
        """Take over `value`. A tensor without storage (meta), or shared with other adapters, is replaced."""
        old, layer = self.tensor, self.layer
        if old.is_meta and not self.shared:
            value = value.detach()
            new = value.to(old.dtype, copy=True) if layer is None else layer.cast_to_base(value, copy=True)
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
        if slot in skip or not adapter.is_saved(slot, adapter.config):
            continue
        if isinstance(value, Tensor):
            inner = box._parameters if isinstance(box, nn.ParameterDict) else box._buffers
            saved = f"{path}.{adapter.saved_key(slot, '')}"
            yield Entry(saved, f"{live}.{slot}.{name}", inner, name, layer, index_bound=adapter.index_bound(slot))
        else:
            for rest, inner, key in tensors_of_module(value):
                saved = f"{path}.{adapter.saved_key(slot, rest)}"
                yield Entry(saved, f"{live}.{slot}.{name}.{rest}", inner, key, layer)


def entries_of_shared(
    cls: Any, slot: str, name: str, value: Any, box: Any, key: str, shared: Mapping[str, Any]
) -> Iterator[Entry]:
    """An entry for a tensor beside the model, at `box[key]`, or for each tensor of such a module.

    `shared`: all that layers share, by slot.
    """
    saved, live = f"base_model.{cls.saved_key(slot, '')}", f"base_model.{slot}.{name}"
    if isinstance(value, Tensor):
        yield Entry(saved, live, box, key, index_bound=cls.shared_index_bound(slot, shared))
    else:
        yield from entries_of_module(value, saved, live)


def entries_of_layers(
    model: nn.Module, name: str, config: Any, shared: Mapping[str, Any], saved: str, live: str, idle: bool = False
) -> Iterator[Entry]:
    """An entry for each saved tensor of adapter `name` on the layers of a model, or in the boxes that these share.

    `saved` and `live` stand before the names of modules, in the two kinds of keys. `idle`: also on layers that the
    adapter left when another was swapped into its place.
    """
    cls = adapter_class(config)
    for slot, box in shared.items():
        if name in box and cls.is_saved(slot, config):
            inner = box._parameters if isinstance(box, nn.ParameterDict) else box._buffers
            values = {s: b[name] for s, b in shared.items() if name in b}
            yield from entries_of_shared(cls, slot, name, box[name], inner, name, values)
    names = PlainNames(model)
    for _, at, layer in adapted(model):
        if isinstance(layer, Layer) and name in layer.adapters and not layer.tied:
            if idle or not layer.adapters[name].idle:
                yield from entries_of_layer(layer, name, saved + names(at), shared, live + at)


# ---------------------------------------------------------------------------------------------------------- checking
def strip(key: str) -> str:
    """A key without the prefix that a PeftModel puts before the names of its base model."""
    return key.removeprefix(PREFIX)


def incoming(weights: Mapping[str, Tensor], config: Any = None) -> dict[str, Tensor]:
    """A checkpoint's tensors without what wrappers around modules put into their keys.

    `config`: that of an adapter which is to be built for them. Raises `CheckpointError` for what is no tensor of real
    numbers, for two keys that mean the same, and if `config` speaks of tensors larger than all of these together.
    """
    found: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for key, tensor in weights.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"A checkpoint has tensors by name, but {shown(key)} is {type(tensor).__name__}.")
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            kind = str(tensor.layout if tensor.layout != torch.strided else tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"'{cut(key, 200)}' is {kind}; an adapter has plain tensors of real numbers.")
        name = unwrapped(key)
        other = origins.setdefault(strip(name), key)
        if other != key:
            raise CheckpointError(f"'{cut(key, 200)}' and '{cut(other, 200)}' mean the same tensor; remove one.")
        found[name] = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor  # float8
    most = sum(tensor.numel() for tensor in found.values())
    for field, value in sizes(config) if config is not None else ():
        if value > most:
            raise CheckpointError(f"The configuration has {field}={value}, but the file holds only {most} numbers.")
    return found


def unwrapped(key: str) -> str:
    """A key without the segments that only wrappers have, and without DistributedDataParallel's around a PeftModel."""
    name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    return name.removeprefix("module.") if name.startswith("module.base_model.") else name


def fitted(entries: Iterable[Entry], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under the keys and in the kinds of dtype that `entries` have, where only that differs.

    The segment `module`, which DistributedDataParallel and others add, may be lacking in either.
    Integers become floating-point numbers, as in PEFT.
    """
    wanted = {strip(entry.saved): entry for entry in entries}
    short: dict[str, list[str]] = {}
    if any("module." in key for key in (*weights, *wanted)):
        for key in wanted:
            short.setdefault(without_module(key), []).append(key)
    given: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if strip(key) not in wanted and len(found := short.get(without_module(strip(key)), [])) == 1:
            if found[0] in given or found[0] in weights or PREFIX + found[0] in weights:
                raise CheckpointError(f"'{cut(key, 200)}' and '{cut(found[0], 200)}' mean the same tensor; remove one.")
            key = found[0]
        entry = wanted.get(strip(key))
        if entry is not None and entry.tensor.is_floating_point() and not tensor.is_floating_point():
            tensor = tensor.to(entry.tensor.dtype)
        given[key] = tensor
    return given


def without_module(key: str) -> str:
    """A key without any segment `module`."""
    return ".".join(part for part in key.split(".") if part != "module")


def check(
    entries: list[Entry],
    weights: Mapping[str, Tensor],
    extra: Iterable[str] = (),
    strict: bool = True,
    stored: Mapping[str, Tensor] | None = None,
    ignore: bool = False,
) -> LoadReport:
    """Compare a checkpoint with the tensors that it is to fill; nothing is changed.

    Raises `CheckpointError` naming missing, unexpected, misshapen and non-finite tensors. With `strict=False` missing
    and unexpected ones are only warned about; with `ignore` (`ignore_mismatched_sizes`) misshapen ones, which then are
    reported as missing. `extra` are keys that may be there besides; `stored` is what the file has where a method made
    `weights` out of it.
    """
    wanted = {strip(entry.saved): entry for entry in entries}
    given = {strip(key): tensor for key, tensor in weights.items()}
    missing = sorted(wanted.keys() - given.keys())
    unexpected = sorted(given.keys() - wanted.keys() - {strip(key) for key in extra})
    unlike = {k: e for k, e in wanted.items() if k in given and given[k].shape != e.tensor.shape}
    shapes = [_unlike(key, given[key], entry) for key, entry in unlike.items()]
    stored = weights if stored is None else stored
    broken = [strip(key) for key, t in stored.items() if t.is_floating_point() and not _finite(t)]
    broken += [key for key in wanted if key in given and key not in broken and _overflows(wanted[key], given[key])]
    misplaced = [key for key in wanted if key in given and _misplaced(wanted[key], given[key])]
    faults = []
    for title, keys, known in (("missing", missing, given), ("unexpected", unexpected, wanted)):
        if keys:
            names = "; ".join(f"{cut(key, 200)}{nearest(key, set(known) - set(keys), 1)}" for key in keys[:5])
            faults.append(f"{len(keys)} {title} tensor(s): {names}" + (" ..." if len(keys) > 5 else ""))
    if unexpected and (hint := _foreign(unexpected)):
        faults.append(hint)
    if faults and not strict:
        warnings.warn("The checkpoint does not fit the model. " + " | ".join(faults), PeftWarning)
        faults = []
    if shapes:
        fault = f"{len(shapes)} tensor(s) of another shape: " + "; ".join(shapes[:5])
        faults += [] if ignore else [fault]
    if broken:
        faults.append(f"{len(broken)} tensor(s) with NaN or infinite values: " + ", ".join(broken[:5]))
    if misplaced:
        faults.append(f"{len(misplaced)} tensor(s) of positions that do not exist: " + ", ".join(misplaced[:5]))
    if faults:
        raise CheckpointError("The checkpoint does not fit the model; nothing was loaded. " + " | ".join(faults))
    if shapes:
        warnings.warn(f"Left out, as ignore_mismatched_sizes=True: {fault}.", PeftWarning)
    return LoadReport(sorted([*missing, *unlike]), unexpected)


def _unlike(key: str, value: Tensor, entry: Entry) -> str:
    """What is said of a tensor of another shape; torch, and code that looks for its messages, begins so."""
    text = f"size mismatch for {key}: {tuple(value.shape)} in the checkpoint, {tuple(entry.tensor.shape)} in the model"
    if entry.frozen and value.dim() and value.shape[1:] == entry.tensor.shape[1:]:
        text += f" (the whole layer was saved: call resize_token_embeddings({value.shape[0]}) on the model first)"
    return text


def _foreign(keys: list[str]) -> str:
    """A hint for keys that other software gives to adapters."""
    if any(key.startswith(("lora_unet_", "lora_te", "lycoris_")) or ".lora_down." in key for key in keys):
        return (
            "These are names of kohya's scripts, A1111 or LyCORIS (lora_down, lora_up, alpha); PEFT's are lora_A and "
            "lora_B. diffusers' `load_lora_weights` reads such a file and can save it anew"
        )
    if any(".processor." in key or "_lora.down." in key for key in keys):
        return "These are names of old diffusers; its `load_lora_weights` reads such a file and can save it anew"
    return ""


def _overflows(entry: Entry, value: Tensor) -> bool:
    """Whether values that are finite in the file's dtype would not be so in the model's."""
    held = entry.tensor
    if held.is_meta and entry.layer is not None:
        held = entry.layer.cast_to_base(value.new_empty(0))
    if not value.is_floating_point() or not held.is_floating_point() or value.dtype == held.dtype:
        return False
    return torch.finfo(value.dtype).max > torch.finfo(held.dtype).max and not _finite(value.to(held.dtype))


def _misplaced(entry: Entry, value: Tensor) -> bool:
    """Whether `value` is for a tensor of positions and holds what is none."""
    if entry.tensor.is_floating_point() or entry.index_bound is None or value.shape != entry.tensor.shape:
        return False
    if value.dtype == torch.bool or (value.is_floating_point() and bool((value != value.trunc()).any())):
        return True
    value, below = value.to("cpu", torch.int64), torch.as_tensor(entry.index_bound, device="cpu")
    return bool((value < 0).any() or (value >= below.view(-1, *[1] * (value.dim() - 1))).any())


def fill(entries: Iterable[Entry], weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's tensors into those entries that it has; the others keep what they have.

    So do those of another shape, of which `check` has told.
    """
    given = {strip(key): tensor for key, tensor in weights.items()}
    for entry in entries:
        value = given.get(strip(entry.saved))
        if value is not None and value.shape == entry.tensor.shape:
            entry.fill(value)


def onloaded(model: nn.Module, entries: Iterable[Entry], keep: bool = False) -> AbstractContextManager[None]:
    """While it is open, offloaded tensors of entries are where they run; see `onload`."""
    boxes = {id(entry.box) for entry in entries}
    holding = [m for m in model.modules() if id(m._parameters) in boxes or id(m._buffers) in boxes]
    return onload(*holding, keep=keep, recurse=False)


def load_into(
    model: Any,
    name: str,
    entries: list[Entry],
    weights: dict[str, Tensor],
    strict: bool = True,
    ignore: bool = False,
    further: Callable[[list[Entry], dict[str, Tensor]], Any] | None = None,
) -> LoadReport:
    """Write a checkpoint's tensors, as `incoming` gives them, into an adapter that is there: all, or on an error none.

    `further(entries, weights)` gives the weights under the keys of the entries, entries for tensors of the model's own,
    and keys that say again what is there. `strict` and `ignore` as for `check`.
    """
    config = model.peft_config[name]
    cls, stored = adapter_class(config), weights
    weights = cls.convert_for_load(config, weights)
    undo = cls.resize(model, name, weights, entries)
    try:
        weights, more, again = further(entries, weights) if further else (fitted(entries, weights), [], ())
        entries = entries + more
        report = check(entries, weights, again, strict, stored, ignore)
    except BaseException:
        if undo is not None:
            undo()
        raise
    with onloaded(model, entries, keep=True):
        fill(entries, weights)
    for layer in layers(model):
        if name in layer.adapters:
            layer.adapters[name].after_load()
    return report


def _finite(t: Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum tells it, and so soon; a sum that overflows does not."""
    t = t.float() if t.dtype.itemsize == 1 else t  # float8 cannot be added up
    return math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all())


# -------------------------------------------------------------------------------------------------- reading, writing
def read_weights(model_id: Any, device: Any = None, **options: Any) -> dict[str, Tensor]:
    """The tensors of a saved adapter. Raises `CheckpointError` when the file cannot be read as what it claims to be."""
    read = lambda: read_weights_file(find_weights(model_id, **options), device)
    return of_one_version(model_id, options.get("subfolder"), read)


def read_weights_file(path: Path, device: Any = None) -> dict[str, Tensor]:
    """The tensors in a file: a pickle of tensors if its name ends with `.bin`, otherwise safetensors."""
    device = str(device) if device is not None else "cpu"
    if path.suffix == ".bin":
        return _read_pickle(path, device)
    from safetensors.torch import load, load_file

    try:
        if device == "cpu" and path.stat().st_size <= READ_WHOLE:
            return load(path.read_bytes())
        return load_file(path, device=device)
    except Exception as error:
        raise CheckpointError(f"'{path}' is not a complete safetensors file ({error}).{look(path)}") from error


def _read_pickle(path: Path, device: str) -> dict[str, Tensor]:
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_PICKLES:
        least = ".".join(map(str, SAFE_PICKLES))
        raise CheckpointError(f"'{path}' is a pickle, which torch reads safely from {least} on; convert or update.")
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        hint = look(path, PICKLE)
        raise CheckpointError(f"'{path}' cannot be read as a pickle of tensors: {error}.{hint}") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"'{path}' must hold a dict of tensors, but holds a {type(tensors).__name__}.")
    warnings.warn(f"'{path}' is a pickle, read with weights_only=True; save it again as safetensors.", PeftWarning)
    return tensors


def serialise(tensors: Mapping[str, Tensor], safe: bool = True) -> bytes:
    """The content of a weights file: safetensors, or with `safe=False` a pickle.

    Raises `CheckpointError` for a sharded tensor.
    """
    own, seen = {}, set()
    for key, tensor in tensors.items():  # each for itself: neither views nor shared memory
        if hasattr(tensor, "full_tensor"):  # a DTensor
            how = "get_model_state_dict(..., options=StateDictOptions(full_state_dict=True)) of torch gives it"
            raise CheckpointError(f"'{key}' is sharded over processes: pass the full `state_dict=`; {how}.")
        tensor = tensor.detach().contiguous()
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        own[key] = tensor.clone() if place in seen or tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        seen.add(place)
    if safe:
        from safetensors.torch import save

        return save(own, {"format": "pt"})
    buffer = io.BytesIO()
    torch.save(own, buffer)
    return buffer.getvalue()


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
