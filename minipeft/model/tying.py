"""Weights that an embedding and other modules share: a head that is tied to it.

transformers' models declare what may be tied (`_tied_weights_keys`) and whether it is (`config.tie_word_embeddings`).
An adapter on the embedding alone would leave the head as it was. `ensure_weight_tying` puts it on both, with one set of
values, wherever `modules_to_save` or `target_modules` mean either; rows of `trainable_token_indices` are always tied.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from ..core.errors import ConfigError, PeftWarning
from ..core.layer import Layer
from ..core.offload import hooked, onload
from ..core.targets import EMBEDDINGS, embedding, named, suffixes
from ..core.walk import walk
from .wrappers import ModulesToSaveWrapper, TrainableTokensWrapper, trained_copy


def input_embedding(model: nn.Module) -> tuple[str | None, nn.Module | None]:
    """(path, layer) of a model's input embedding, inside all adapters; (None, None) when it does not tell."""
    module = embedding(model)
    found = [(path, part) for path, _, part in walk(model) if part is module]
    if not found:
        return None, None
    return found[0][0], list(walk(module))[-1][2] if isinstance(module, _WRAPPERS) else module


_WRAPPERS = (Layer, ModulesToSaveWrapper, TrainableTokensWrapper)


def tied_names(model: nn.Module) -> list[str]:
    """Paths of the modules that use the weight of the input embedding as their own; none when tying is switched off."""
    return _tied_to(*input_embedding(model), model)


def _tied_to(path: str | None, embedding: nn.Module | None, model: nn.Module) -> list[str]:
    weight = getattr(embedding, "weight", None)
    if weight is None or not _ties(model, unless_said=True):
        return []
    if not any(getattr(module, "_tied_weights_keys", None) for module in model.modules()):
        return []
    users = [p for p, _, m in walk(model) if any(same(m, embedding, name) for name in m._parameters)]
    return sorted(set(users) - {path})


def same(one: Any, other: Any, name: str = "weight") -> bool:
    """Whether one.<name> is other.weight. Offloading takes such weights apart: then, whether they are equal."""
    a, b = one._parameters[name], other._parameters.get("weight")
    if a is b or a is None or b is None or not (a.is_meta and b.is_meta and a.shape == b.shape):
        return a is b
    with onload(one, other, recurse=False):
        a, b = one._parameters[name], other._parameters["weight"]
        return not a.is_meta and torch.equal(a, b)


def _ties(model: nn.Module, unless_said: bool = False) -> bool:
    """Whether the model's configuration says that its embeddings are tied."""
    said = getattr(getattr(model, "config", None), "tie_word_embeddings", unless_said)
    return bool(said)


class Ties:
    """What one new adapter ties. Its configuration is completed as PEFT does it."""

    def __init__(self, config: Any, model: nn.Module, always: bool = False):
        self.config, self.model = config, model
        self.embedding, words = input_embedding(model)
        self.names = _tied_to(self.embedding, words, model)  # paths of what is tied to the embedding
        self.targets: list[str] = []  # those whose adapter follows that of the embedding
        self.modules: list[str] = []  # those whose trained copy does
        self.pairs: list[tuple[Any, Any]] = []  # (adapter, the one that it follows)
        self.copies: list[tuple[nn.Module, nn.Module]] = []  # (trained copy, the one that it follows)
        ensure = getattr(config, "ensure_weight_tying", None)
        targets, save = getattr(config, "target_modules", None), getattr(config, "modules_to_save", None)
        save = {save} if isinstance(save, str) else set(save or ())
        in_save, in_targets = self._meant(save), self._meant(targets)
        if always and (targets is None or named(self.embedding or "", targets)):
            self.targets = self.names
        elif not ensure:
            if in_save or in_targets:
                why = "`ensure_weight_tying` is not set to True"
                if ensure is None:
                    why = "no implementation exists to tie the adapters"
                warnings.warn(
                    f"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but {why}: merging "
                    "will untie the two, and formats other than safetensors may lose one. "
                    "See https://github.com/huggingface/peft/issues/2777",
                    PeftWarning,
                    stacklevel=2,
                )
        elif not self.names:
            warnings.warn(
                "You have requested `ensure_weight_tying`, but no tied modules were found in the model.",
                PeftWarning,
                stacklevel=2,
            )
        elif in_save:
            self.modules = self.names
            kept = [name for name in config.modules_to_save if not self._is_tied(name)]
            config.modules_to_save = kept if self.embedding in kept else [*kept, self.embedding]
        elif in_targets:
            self.targets = self.names
            if isinstance(targets, str):
                end = rf"|^{re.escape(str(self.embedding))}$)"
                config.target_modules = targets if targets.endswith(end) else f"(?:{targets}{end}"
            else:
                config.target_modules = {name for name in targets or () if not self._is_tied(name)} | {self.embedding}
        elif getattr(config, "trainable_token_indices", None) is None:
            warnings.warn(
                "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` "
                "or `target_modules`.",
                PeftWarning,
                stacklevel=2,
            )

    def _meant(self, names: Any) -> bool:
        return bool(self.names) and any(named(path, names) for path in (self.embedding or "", *self.names))

    def _is_tied(self, name: str) -> bool:
        return any(name in suffixes(path) for path in self.names)

    def order(self, paths: list[str]) -> list[str]:
        """Paths to adapt, with those that follow the embedding in the end."""
        return [path for path in paths if path not in self.targets] + self.targets if self.targets else paths

    def follow(self, plan: Any) -> None:
        """Let the new adapters on tied layers follow the one on the embedding."""
        new = {s.adapters[plan.name].path: s.adapters[plan.name] for _, s, _ in plan.new if self.targets}
        for path in self.targets:
            self._pair(new[path], new[self.embedding])
        for adapter, source in self.pairs:  # a head may have set the initial values of all
            adapter.tie_to(source)

    def _pair(self, adapter: Any, source: Any) -> None:
        adapter.tie_to(source, fresh=not adapter.layer.on_meta)
        self.pairs.append((adapter, source))

    def copy(self, plan: Any) -> None:
        """Add trained copies of the modules that are tied to the embedding."""
        if not self.modules:
            return
        at = {path: (live, module) for path, live, module in reversed(list(walk(self.model)))}
        sources = {live: copied for live, _, copied in plan.copies}
        for path in self.modules:
            live, module = at[path]
            copied = trained_copy(module)
            plan.copies.append((live, module, copied))
            self.copies.append((copied, sources[at[self.embedding or ""][0]]))

    def tokens(self, wanted: dict[str, list[int]]) -> dict[str, list[int]]:
        """`trainable_token_indices` without the layers that follow the embedding."""
        ensure = getattr(self.config, "ensure_weight_tying", False)
        self.rows = self.names if _ties(self.model) else []
        if ensure and not self.rows:
            warnings.warn(
                "ensure_weight_tying=True but the model does not have tied weights: nothing will be tied.",
                PeftWarning,
                stacklevel=2,
            )
        mean_it = set(suffixes(self.embedding or "")) & wanted.keys()  # one of them may mean a tied layer, too
        source = next((wanted[name] for name in wanted if name in mean_it), None)
        others = {n: i for n, i in wanted.items() if n not in mean_it and self._is_tied(n)} if self.rows else {}
        if source is None or not others:
            return wanted
        if all(list(indices) == list(source) for indices in others.values()):
            return {n: i for n, i in wanted.items() if n not in others}
        if ensure:
            raise ConfigError(
                f"Cannot ensure weight tying when different token indices are specified for tied layers: {wanted}. "
                "Use the same indices for all of them, or set ensure_weight_tying=False."
            )
        self.rows = []
        return wanted

    def follow_tokens(self, plan: Any, cls: Any, config_of: Any) -> None:
        """Let rows of the tied layers follow those of the embedding, planned already; they are not saved again."""
        at = {path: (live, module) for path, live, module in reversed(list(walk(self.model)))}
        planned = {scratch.adapters[plan.name].path: scratch.adapters[plan.name] for _, scratch, _ in plan.tokens}
        if self.embedding is None or (source := planned.get(self.embedding)) is None:
            return
        save = self.config.modules_to_save or ()
        for path in self.rows:
            if named(path, {save} if isinstance(save, str) else set(save)):
                continue  # it is trained in full, for itself
            scratch = plan.rows_of(path, *at[path], cls, config_of(source.token_indices))
            if scratch is None:
                why = "do not target it, nor train it in full with another adapter"
                raise ConfigError(f"'{path}' is tied to the embedding of `trainable_token_indices`; {why}.")
            scratch.tied = True
            self._pair(scratch.adapters[plan.name], source)

    def commit(self) -> None:
        """Tie for good what is in place now, its values loaded."""
        for copied, source in self.copies:
            mine: Any = copied.weight
            its: Any = source.weight
            if mine.is_meta or its.is_meta or torch.equal(mine, its):
                copied.weight = its
            else:  # PEFT does not tie all that is tied here
                warnings.warn(
                    "The loaded copies of tied modules (modules_to_save) are not the same; they are not tied.",
                    PeftWarning,
                    stacklevel=2,
                )
        for adapter, source in self.pairs:
            empty = any(tensor.device.type == "meta" for tensor in adapter.parameters())
            if not empty and not adapter.matches(source):  # PEFT loses the tie when it casts the adapter
                warnings.warn(
                    f"The loaded adapter is not the same on '{adapter.path}' and '{source.path}'; they are not tied.",
                    PeftWarning,
                    stacklevel=2,
                )
                continue
            adapter.tied_to = source
            adapter.tie_to(source)
            adapter.layer.register_forward_pre_hook(Tie(adapter, source))


class Tie:
    """Before a layer runs: ties again what moving the model to another device or dtype has torn apart."""

    def __init__(self, adapter: Any, source: Any):
        self.adapter, self.source = adapter, source

    def __call__(self, *args: Any) -> None:
        if self.adapter.layer.adapters.get(self.adapter.name) is self.adapter:
            if not hooked(self.adapter.layer):
                return self.adapter.tie_to(self.source)
            with self.source.layer.onloaded(), self.adapter.layer.onloaded(keep=True):
                self.adapter.tie_to(self.source)


# ----------------------------------------------------------------------------------------------------------- merging
def warn_of_tied(tuner: Any) -> None:
    """Before merging: warn when tied layers are adapted, which it unties."""
    targeted = [n for n in tuner.targeted_module_names if n.rpartition(".")[2] in EMBEDDINGS]
    if targeted and _ties(tuner.model):
        warnings.warn(
            f"Model with `tie_word_embeddings=True` and the tied_target_modules={targeted} are part of the adapter. "
            "Merging unties them unless their adapters are tied as well (`ensure_weight_tying`).",
            PeftWarning,
            stacklevel=2,
        )


def note_untied(model: nn.Module, when: str = "after merging") -> None:
    """Tell the model's configuration when its embeddings are no longer tied."""
    layers = [embedding(model, output) for output in (False, True)]
    weights = [getattr(layer, "weight", None) for layer in layers]
    if _ties(model) and None not in weights and weights[0] is not weights[1] and not same(*layers):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        warnings.warn(
            f"Input and output embeddings are no longer tied {when}. "
            "Setting `tie_word_embeddings=False` in the model config.",
            PeftWarning,
            stacklevel=2,
        )
