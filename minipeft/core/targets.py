"""Which modules a configuration means.

A list of targets names modules by their last path segments: "q_proj" and "self_attn.q_proj" both mean
"model.layers.0.self_attn.q_proj". A string is a regular expression for the whole path, or "all-linear". Paths are those
of the model before any adapter came.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

from .config import TaskType
from .errors import NoMatchingPeftModuleError, PeftWarning, nearest
from .patterns import in_layer_path, matches

ALL_LINEAR = "all-linear"
DUMMY_TARGETS = "dummy-target-modules"  # an adapter without any layer, to be filled in later
HEADS = ("score", "classifier")  # of sequence classifiers; "all-linear" leaves them out
EMBEDDINGS = ("embed_tokens", "lm_head")
HEAD_NAMES = ("classifier", "score", "qa_outputs")  # asked for by the task classes, whichever of them is there
Others = Callable[[], dict[str, str]]  # gives the further names of a model's shared modules, each with its path


def suffixes(path: str) -> list[str]:
    """The path and each of its tails: "a.b.c", "b.c", "c"."""
    tails = [path]
    while dot := path.find(".") + 1:
        tails.append(path := path[dot:])
    return tails


def named(path: str, names: Iterable[str] | str | None) -> bool:
    """Whether `names` (a list of path tails, or a regular expression for the whole path) means `path`."""
    if not names:
        return False
    if isinstance(names, str):
        return matches(names, path)
    names = names if isinstance(names, (set, frozenset, dict)) else set(names)
    return any(tail in names for tail in suffixes(path))


def saves(path: str, names: Iterable[str]) -> bool:
    """Whether `modules_to_save` means `path`: in PEFT, any end of it, so "classifier" means "pre_classifier", too."""
    return path.endswith(tuple(names))


def exactly(paths: set[str], known: Iterable[str]) -> Any:
    """Targets that mean `paths` and no other of the `known` ones: a set, or an expression where tails are ambiguous."""
    if any(path not in paths and named(path, paths) for path in known):
        return "|".join(sorted(map(re.escape, paths)))
    return paths


def under(path: str, names: Iterable[str] | None) -> bool:
    """Whether `path` is, or lies under, a module that one of `names` means."""
    parts = path.split(".")
    return bool(names) and any(named(".".join(parts[:i]), names) for i in range(1, len(parts) + 1))


def pattern_value(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value in `rank_pattern` or `alpha_pattern` for a layer: the first key that fits its path, or `default`."""
    for key, value in (patterns or {}).items():
        if matches(in_layer_path(key), path):
            return value
    return default


class Targets:
    """The targets of one configuration: `path in targets`. Keeps count of the entries that met something."""

    def __init__(self, config: Any):
        self.names = getattr(config, "target_modules", None)
        self.exclude = getattr(config, "exclude_modules", None)
        self.save = getattr(config, "modules_to_save", None) or ()
        indexes = getattr(config, "layers_to_transform", None)
        self.indexes = {indexes} if isinstance(indexes, int) else set(indexes or ())
        pattern = getattr(config, "layers_pattern", None)
        self.layers = [pattern] if isinstance(pattern, str) else list(pattern or ())
        self.met: set[str] = set()  # entries of `names` that fit some path
        self.excluded: list[str] = []

    def __contains__(self, path: str) -> bool:
        if not self.names or not path:
            return False
        hits = {self.names} if isinstance(self.names, str) else set(suffixes(path)) & self.names
        if isinstance(self.names, str) and not matches(self.names, path):
            return False
        if not hits:
            return False
        self.met |= hits
        if named(path, self.exclude) or under(path, self.save):
            self.excluded.append(path)
            return False
        exact = not isinstance(self.names, str) and path in self.names  # PEFT: a full path overrides the layer numbers
        return exact or not self.indexes or self._index(path) in self.indexes

    def _index(self, path: str) -> int | None:
        """The number of the layer that `path` lies in: the first number, or the one behind `layers_pattern`."""
        for pattern in self.layers or [r"[^.]*"]:
            head = r"(?:^|.*?\.)" if self.layers else r".*?\."
            if match := re.match(rf"{head}{pattern}\.(\d+)\.", path):
                return int(match[1])
        return None

    def check(self, found: list[str], paths: list[str], others: Others, stacked: Callable[[], list[str]]) -> None:
        """Raise `NoMatchingPeftModuleError` when nothing was found to adapt; warn of names that match nothing.

        `paths`: those of all modules; `stacked()` gives those of parameters that hold the weights of several experts.
        """
        if self.names is None or self.names == DUMMY_TARGETS:
            return
        hint = unmatched(set() if isinstance(self.names, str) else self.names - self.met, paths, found, others)
        if (hint or not found) and (experts := stacked()):
            names = ", ".join(map(repr, experts[:5]))
            hint = f"{hint} The experts of this model are no modules: name {names} in `target_parameters`.".lstrip()
        if not found:
            shown = self.names if isinstance(self.names, str) else sorted(self.names)
            why = hint
            if self.excluded:
                why += f" {len(self.excluded)} modules were left out by `exclude_modules` or `modules_to_save`."
            if self.indexes:
                why += f" `layers_to_transform` was {sorted(self.indexes)}, `layers_pattern` {self.layers}."
            raise NoMatchingPeftModuleError(
                f"Target modules {shown} not found in the base model. "
                f"No modules were targeted for adaptation. {why}".rstrip()
            )
        warn_unmatched("target_modules", hint)


def unmatched(names: Iterable[str], paths: Iterable[str], found: Collection[str], others: Others) -> str:
    """What to say of names that match none of `paths`; nothing of further names of modules that are `found`."""
    names = sorted(names)
    also = {tail: path for other, path in (others() if names else {}).items() for tail in suffixes(other)}
    names = [name for name in names if also.get(name) not in found]
    if not names:
        return ""
    tails = {tail for path in paths for tail in suffixes(path)}
    said = [
        f"{name!r} is another name of '{also[name]}'."
        if name in also
        else f"{name!r} matches nothing.{nearest(name, tails)}"
        for name in names[:5]
    ]
    return " ".join(said) + (f" So do {len(names) - 5} more." if len(names) > 5 else "")


def warn_unmatched(field: str, hint: str) -> None:
    """Warn of what `unmatched` says, if that is anything: the other names of the field are adapted."""
    if hint:
        warnings.warn(f"Not all of `{field}` are in the model; those that are not were left out: {hint}", PeftWarning)


def embedding(model: Any, output: bool = False) -> Any:
    """What a model names as its input (or output) embedding; None where it has no answer, as for images and speech."""
    try:
        return model.get_output_embeddings() if output else model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def linear_targets(model: Any, config: Any) -> dict[str, Any]:
    """The base of each linear layer that `config` means, by path, in a model without adapters; no targets: of all."""
    from .bases import Linear
    from .kinds import base_of

    bases = {path: base_of(module) for path, module in model.named_modules() if path}
    linear = {path: base for path, base in bases.items() if isinstance(base, Linear) and not base.needs_weights}
    names = config.target_modules
    wanted: Any = Targets(config)
    if names is None or (isinstance(names, str) and names.lower() == ALL_LINEAR):
        wanted = linear if names is None else all_linear(model, config.task_type, bases.items())
    return {path: base for path, base in linear.items() if path in wanted}


def all_linear(model: Any, task_type: Any, paths: Iterable[tuple[str, Any]]) -> set[str]:
    """What "all-linear" means: every linear layer but the output layer. `paths`: (path, base or None)."""
    from .bases import Linear

    skip: set[int] = set()
    head = embedding(model, output=True)
    if head is not None:
        skip.add(id(getattr(getattr(head, "base", None), "leaf", head)))
    elif task_type == TaskType.SEQ_CLS:
        skip |= {id(getattr(model, name)) for name in HEADS if getattr(model, name, None) is not None}
    plain = ((path, base) for path, base in paths if isinstance(base, Linear) and not base.needs_weights)
    return {path for path, base in plain if id(base.leaf) not in skip}


def check_saved(names: set[str], paths: list[str], found: Collection[str], others: Others, loading: bool) -> None:
    """Raise `NoMatchingPeftModuleError` when none of `modules_to_save` was found; warn when some were not.

    `loading`: no more than warn, as the checkpoint's tensors say whether it fits.
    """
    missing = {name for name in names if name not in HEAD_NAMES and not any(saves(path, {name}) for path in paths)}
    hint = unmatched(missing, paths, found, others)
    if hint and not loading and missing == names:
        raise NoMatchingPeftModuleError(f"None of modules_to_save is in the model: {hint}")
    warn_unmatched("modules_to_save", hint)
