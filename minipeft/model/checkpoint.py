"""The checkpoint of an adapter in a whole model: layers, modules trained in full, biases, whole embedding layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import adapter_class
from ..core.bases import inference_mode_off
from ..core.errors import AdapterNameError, CheckpointError, PeftWarning
from ..core.files import kept_file
from ..core.layer import HoldsAdapters, Layer, adapted
from ..core.state import (
    PREFIX,
    Entry,
    LoadReport,
    entries_of_layer,
    entries_of_layers,
    entries_of_module,
    fitted,
    incoming,
    load_into,
    onloaded,
    strip,
    unwrapped,
)
from ..core.targets import EMBEDDINGS, embedding, named
from ..core.tuner import tuner_of
from ..core.walk import PlainNames, Wrapper, walk
from .experts import present_keys
from .wrappers import ModulesToSaveWrapper, TrainableTokensWrapper, copies_in

WRAPPED = {kind.wraps for kind in (Layer, ModulesToSaveWrapper, TrainableTokensWrapper)}  # names in live keys


def entries_of_model(model: Any, name: str, idle: bool = False) -> Iterator[Entry]:
    """An entry for each saved tensor of adapter `name` on a model, with the keys of that model.

    `idle`: also on layers that it left when another was swapped into its place.
    """
    tuner = tuner_of(model)
    inside = tuner is not None and tuner is not model
    root, prefix = (tuner.model, PREFIX) if inside else (getattr(tuner, "model", model), "")
    if tuner is model:  # a bare tuner: its keys lack the first segment only
        prefix = "model."
    begin = prefix.removesuffix("model.") + f"{tuner.root}." if prefix and tuner is not None else prefix
    shared = {} if tuner is None else tuner.shared_slots()
    yield from entries_of_layers(root, name, model.peft_config[name], shared, prefix, begin, idle)
    yield from entries_of_copies(copies_in(root, name), root, name, prefix)
    if tuner is not None:
        yield from tuner.further_entries(name, prefix)


def entries_of_copies(
    copies: Iterable[tuple[str, nn.Module]], root: nn.Module, name: str, prefix: str = PREFIX
) -> Iterator[Entry]:
    """An entry for each tensor of `copies`, (live path, copy): modules of `root` that adapter `name` trains in full."""
    names = PlainNames(root)
    for live, copied in copies:
        yield from entries_of_module(copied, prefix + names(live), f"{prefix}{live}.modules_to_save.{name}")


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
    while isinstance(inside := vars(model).get("_modules", {}).get("_fsdp_wrapped_module"), nn.Module):
        state_dict = model.state_dict() if state_dict is None else state_dict  # the wrapper gathers what is sharded
        model = inside
    if adapter_name not in model.peft_config:
        raise AdapterNameError(f"Adapter {adapter_name} not found; this model has {sorted(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        return model._adapters.state_dict(adapter_name, save_embedding_layers)
    saved = {}
    given = state_dict or {}
    plain = {unwrapped(key): tensor for key, tensor in given.items()}
    entries = list(entries_of_model(model, adapter_name))
    with onloaded(model, entries if state_dict is None else ()):
        for entry in entries:
            tensor = given.get(entry.live, plain.get(unwrapped(entry.live)))
            if tensor is None and state_dict is not None and isinstance(entry.tensor, nn.Parameter):
                raise CheckpointError(f"`state_dict` lacks '{entry.live}', which belongs to adapter {adapter_name!r}.")
            saved[entry.saved] = entry.tensor.detach() if tensor is None else tensor  # not all buffers stand in one
    saved = adapter_class(config).convert_for_save(config, adapter_name, saved, entries)
    for entry in _bias_entries(model, adapter_name):
        saved.setdefault(entry.saved, entry.tensor.detach() if state_dict is None else state_dict[entry.live])
    root = getattr(tuner_of(model), "model", model)
    prefix = "" if root is model else PREFIX
    whole = embeddings_to_save(model, adapter_name, save_embedding_layers, root, prefix)
    with onloaded(model, whole if state_dict is None else ()):
        before = before_merging(root)
        for entry in whole:
            if state_dict is not None and entry.live not in state_dict:
                raise CheckpointError(f"`state_dict` lacks '{entry.live}'; save_embedding_layers=False leaves it out.")
            held = before.get(id(entry.tensor), entry.tensor).detach() if state_dict is None else state_dict[entry.live]
            saved.setdefault(entry.saved, held)
    return saved


def before_merging(model: nn.Module) -> dict[int, Tensor]:
    """What the tensors of frozen layers that adapters are merged into were before, by the `id` of the tensor."""
    found: dict[int, Tensor] = {}
    for _, _, layer in adapted(model):
        if isinstance(layer, Layer) and layer.base.changed:
            pairs = zip(layer.base.stored(), layer.base.originals())
            found |= {id(now): original for now, original in pairs if now is not None}
    return found


def entries_of_biases(
    root: nn.Module,
    name: str,
    bias: str,
    prefix: str,
    around: Mapping[str, int] | None = None,
    joined: Iterable[Layer] = (),
    copied: Iterable[str] = (),
) -> Iterator[Entry]:
    """An entry for each bias of the model's own that adapter `name` trains, as its field `bias` says.

    Biases in modules that it trains in full are not among them: its copies have their own, and the originals are not
    in use. Saved keys have the `base_layer` of its own layers only, whatever other adapters stand there. Of an adapter
    that is to be put in place: `around` says how many layers at which live paths, `joined` which layers it joins, and
    `copied` what it trains in full, by live path.
    """
    names, around, copies = PlainNames(root), around or {}, [*copied]
    own, foreign, seen = [*map(id, joined)], set(), set()
    for _, live, module in walk(root) if bias != "none" else ():
        if isinstance(module, HoldsAdapters):
            if name not in module.adapters and id(module) not in own:
                foreign.add(f"{live}.{module.wraps}".lstrip("."))
            elif isinstance(module, ModulesToSaveWrapper):
                copies.append(live)
        parameter = module._parameters.get("bias")
        if parameter is None or id(parameter) in seen or any(f"{live}.".startswith(f"{path}.") for path in copies):
            continue
        seen.add(id(parameter))
        old = key = ""
        for part in [*live.split("."), "bias"] if live else ["bias"]:
            old = f"{old}.{part}".lstrip(".")
            if old not in foreign:
                key = f"{key}.{part}".lstrip(".")
            key += ".base_layer" * around.get(old, around.get(key, 0))  # out_proj comes to stand below another
        if bias == "all" or key.endswith(".base_layer.bias"):
            yield Entry(prefix + names(key), prefix + old, module._parameters, "bias")


def embeddings_to_save(model: Any, name: str, save: bool | str, root: Any, prefix: str) -> list[Entry]:
    """The embedding and output layers, when they are to be saved whole, with all that adapter `name` has there.

    `root` is the base model, and `prefix` what stands before the names of its modules in keys.
    """
    config = model.peft_config[name]
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
        return []
    if embedding(root) is None:
        warnings.warn("Could not identify embedding layer(s): `get_input_embeddings` gives none.", PeftWarning)
        return []
    plain = PlainNames(root)
    names = {id(module): plain(live) for _, live, module in walk(root)}
    found: list[Entry] = []
    for layer in embeddings(root):  # what stands inside a copy (modules_to_save) is saved with that
        if id(layer) in names and (isinstance(layer, Layer) or not targeted):
            found += _whole(layer, prefix + names[id(layer)], name)
    return found


def _whole(layer: nn.Module, live: str, name: str) -> Iterator[Entry]:
    """An entry for each tensor of an embedding layer, and of adapter `name` where it is wrapped for that."""
    if not isinstance(layer, Wrapper):
        yield from entries_of_module(layer, live, live)
        return
    yield from _whole(getattr(layer, layer.wraps), f"{live}.{layer.wraps}", name)
    if isinstance(layer, ModulesToSaveWrapper) and name in layer.modules_to_save:
        copied = layer.modules_to_save[name]
        yield from entries_of_module(copied, f"{live}.modules_to_save", f"{live}.modules_to_save.{name}")
    elif isinstance(layer, TrainableTokensWrapper) and name in layer.token_adapter.adapters:
        yield from entries_of_layer(layer.token_adapter, name, f"{live}.token_adapter")


def embeddings(root: Any) -> list[nn.Module]:
    """A model's input and output embedding layers, as it gives them: those of an adapted model in their wrappers."""
    return [layer for layer in (embedding(root), embedding(root, output=True)) if layer is not None]


def resized(root: nn.Module, config: Any) -> bool:
    """Whether the vocabulary differs from that of the base model's local folder, or of what came from the hub."""
    import json

    own = getattr(getattr(root, "config", None), "vocab_size", None)
    name = config.base_model_name_or_path
    path = kept_file(name, "config.json", config.revision) if own is not None and name else None
    if path is None:
        return False
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the base model's own file, which is not ours to judge
        return False
    return isinstance(kept, dict) and kept.get("vocab_size", own) != own


@inference_mode_off()
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
    `strict=False` warns about the first two. `ignore_mismatched_sizes` leaves misshapen ones out with a warning. Whole
    embedding layers that the checkpoint holds as the model's own (`save_embedding_layers`) are written into the model.
    """
    if adapter_name not in model.peft_config:
        raise AdapterNameError(f"Adapter {adapter_name} not found; this model has {sorted(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        return model._adapters.load_state_dict(adapter_name, peft_model_state_dict, strict, ignore_mismatched_sizes)

    def further(entries: list[Entry], weights: dict[str, Tensor]) -> Any:
        weights = present_keys(config, getattr(tuner_of(model), "model", model), adapter_name, entries, weights)
        weights = fitted(entries, single(entries, weights))
        have = {strip(entry.saved) for entry in entries}
        biases = [entry for entry in _bias_entries(model, adapter_name) if strip(entry.saved) not in have]
        whole, again = base_entries(model, weights, entries + biases)
        return weights, biases + whole, again

    entries, given = list(entries_of_model(model, adapter_name)), incoming(peft_model_state_dict)
    return load_into(model, adapter_name, entries, given, strict, ignore_mismatched_sizes, further)


def _bias_entries(model: Any, name: str) -> list[Entry]:
    """An entry for each trained bias, in use or not."""
    tuner = tuner_of(model)
    if tuner is None:
        return list(entries_of_biases(model, name, getattr(model.peft_config[name], "bias", "none"), ""))
    if tuner.bias_owner != name:
        return []
    prefix = "model." if tuner is model else PREFIX
    live = {id(parameter): live for live, parameter in tuner.model.named_parameters()}
    return [
        Entry(prefix + key, prefix + live.get(id(parameter), key), {key: tuner.trained_bias(key)}, key)
        for key, (parameter, _) in tuner.biases.items()
    ]


def base_entries(
    model: nn.Module, weights: Mapping[str, Tensor], own: Iterable[Entry], prefix: str = PREFIX
) -> tuple[list[Entry], list[str]]:
    """What a checkpoint holds of embedding layers that are saved whole, beside the tensors `own` of the adapter.

    Entries for the model's own tensors, and keys that say again what `own` has. A key of `own` never means the model's
    own tensor: an embedding that an adapter trains in full is saved under the name of the frozen one. `prefix` is what
    stands before the names of modules in keys. Raises `CheckpointError` when what is said twice is not the same.
    """
    root = getattr(tuner_of(model), "model", model)
    taken = {strip(entry.saved) for entry in own}
    given = {strip(key): tensor for key, tensor in weights.items()}
    ids = {id(layer) for layer in embeddings(root)}
    if not ids or not given.keys() - taken:
        return [], []
    paths: set[str] = set()
    frozen: dict[str, tuple[str, nn.Module]] = {}
    for path, live, module in walk(root):
        if id(module) in ids:
            paths.add(path)
        if path in paths:
            frozen[strip(prefix + path)] = live, module  # the innermost comes last
    mine = {_unwrapped(key): given[key] for key in taken & given.keys()}
    found, again = [], []
    for key in sorted(given.keys() - taken):
        plain = _unwrapped(key)
        for path, (live, layer) in frozen.items():
            if not plain.startswith(f"{path}."):
                continue
            slot = plain[len(path) + 1 :]
            if layer._parameters.get(slot) is not None:
                found.append(Entry(PREFIX + key, f"{live}.{slot}", layer._parameters, slot, frozen=True))
            twins = {plain.replace(".modules_to_save.", "."), *(f"{other}.{slot}" for other in frozen)}
            if any(_same(mine[twin], given[key]) for twin in twins & mine.keys()):
                again.append(key)
    held: dict[int, str] = {}
    for entry in found:
        first = held.setdefault(id(entry.tensor), strip(entry.saved))
        if not _same(given[first], given[strip(entry.saved)]):
            raise CheckpointError(
                f"'{first}' and '{strip(entry.saved)}' are not the same in the checkpoint, but are one tensor of the "
                "model (tied, or under two names); nothing was loaded."
            )
    return found, again


def single(entries: Iterable[Entry], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without biases that are said twice.

    With `bias="all"` PEFT saves the bias of a module that is trained in full twice more, under the names of the copy
    and of the original, which is not in use.
    """
    wanted = {strip(entry.saved) for entry in entries}
    found = {}
    for key, tensor in weights.items():
        if strip(key) not in wanted and key.endswith(".original_module.bias") and _unwrapped(strip(key)) in wanted:
            continue
        own = key.replace(".modules_to_save.", ".")
        if strip(key) not in wanted and key.endswith(".modules_to_save.bias") and strip(own) in wanted:
            if own in weights and _same(weights[own], tensor):
                continue
        found[key] = tensor
    return found


def _unwrapped(key: str) -> str:
    """A key without the names of what adapters put around a module."""
    return ".".join(part for part in key.split(".") if part not in WRAPPED)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
