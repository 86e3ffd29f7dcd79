"""Building one adapter beside a whole model: copies of modules, rows of embeddings, biases and tied weights too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from ..core import registry
from ..core.adapter import ADAPTERS
from ..core.config import CONFIGS, PeftType
from ..core.errors import ConfigError, NoMatchingPeftModuleError, UnsupportedLayerError
from ..core.kinds import base_of
from ..core.layer import Layer
from ..core.offload import check_biases
from ..core.plan import Plan, model_config
from ..core.state import PREFIX, Entry, entries_of_layer, strip
from ..core.targets import saves, suffixes, unmatched, warn_unmatched
from ..core.walk import PlainNames, walk
from .checkpoint import base_entries, entries_of_biases, entries_of_copies, single
from .defaults import NEVER_CALLED, default_targets, embedding_path
from .experts import name_parameters, present_keys
from .tying import Ties
from .wrappers import ModulesToSaveWrapper, TrainableTokensWrapper, copied_modules


class ModelPlan(Plan):
    """One adapter, built beside a model and ready to be put into it."""

    def __init__(self, tuner: Any, name: str, config: Any, **options: Any):
        self.copies: list[tuple[str, nn.Module, nn.Module]] = []  # live path, module there now, its trained copy
        self.tokens: list[tuple[str, Layer, Layer | None]] = []  # as `new`, to be put into a wrapper
        super().__init__(tuner, name, config, **options)

    def check_beside(self, others: dict[str, Any]) -> None:
        config = self.config
        if sum(getattr(c, "bias", "none") != "none" for c in (config, *others.values())) > 1:
            raise ConfigError("Only one adapter of a model can train biases; set bias='none' for the others.")
        self.cls.check_beside(config, others)
        if getattr(config, "bias", "none") != "none":
            check_biases(self.model)

    def set_present_names(self) -> None:
        name_parameters(self.config, self.model, self.model_type)

    def set_default_targets(self) -> None:
        default_targets(self.config, self.model, self.model_type)

    @cached_property
    def model_type(self) -> str | None:
        """What transformers calls the model's kind."""
        return model_config(self.model).get("model_type")

    def tie(self) -> None:
        self.ties = Ties(self.config, self.model, self.cls.ties)

    def ordered(self, paths: list[str]) -> list[str]:
        uncalled = NEVER_CALLED.get(self.model_type, ())
        for path in paths:
            if path.rpartition(".")[2] in uncalled:
                why = "their kernels read its weight and do not call it, so an adapter would have no effect"
                raise UnsupportedLayerError(f"'{path}' is incompatible with Mamba-based models: {why}.")
        return self.ties.order(paths)

    # ------------------------------------------------------------------------------------------------------ building
    def build_further(self) -> None:
        self.ties.follow(self)
        self.copies += copied_modules(self.model, self.config, self.loading, self.newest)
        self.ties.copy(self)
        self.add_beside()

    def add_beside(self) -> None:
        """Build what a field of the configuration adds of another method: `trainable_token_indices`."""
        for field, peft_type in registry.BESIDE.items():
            if (indices := getattr(self.config, field, None)) is not None:
                registry.load(peft_type)
                self.add_rows(indices, PeftType(peft_type))

    def add_rows(self, indices: Any, method: PeftType) -> None:
        """Build adapters of a method that trains rows of embeddings."""
        cls, kind = ADAPTERS[method][0], cast(Any, CONFIGS[method])
        config_of = lambda rows: kind(token_indices=list(rows))
        paths = {path: (live, module) for path, live, module in reversed(list(walk(self.model)))}
        wanted = self.ties.tokens(indices if isinstance(indices, dict) else {embedding_path(self.model): indices})
        named_here = {target: [path for path in paths if path and target in suffixes(path)] for target in wanted}
        hint = unmatched({target for target, found in named_here.items() if not found}, paths, [], self.others)
        if hint and not any(named_here.values()):
            raise NoMatchingPeftModuleError(f"trainable_token_indices names nothing that is in the model: {hint}")
        warn_unmatched("trainable_token_indices", hint)
        follow = self.ties.rows if any(self.ties.embedding in found for found in named_here.values()) else ()
        for target, rows in wanted.items():
            for path in (path for path in named_here[target] if path not in follow):
                if saves(path, self.config.modules_to_save or ()):
                    raise ConfigError(f"'{path}' is trained in full (modules_to_save): no trainable_token_indices.")
                if self.rows_of(path, *paths[path], cls, config_of(rows)) is None:
                    needs = "an embedding that has no other adapter"
                    raise UnsupportedLayerError(f"trainable_token_indices needs {needs}, but '{path}' is not one.")
        self.ties.follow_tokens(self, cls, config_of)

    def rows_of(self, path: str, live: str, module: Any, cls: Any, config: Any) -> Layer | None:
        """Build the adapter for rows of one layer; None where there is another adapter, or no rows."""
        existing = module.token_adapter if isinstance(module, TrainableTokensWrapper) else None
        inside, base = (module, base_of(module)) if existing is None else (existing.base_layer, existing.base)
        taken = isinstance(module, Layer) or live in {at for at, *_ in self.new}
        if taken or base is None or not cls.fits(base):
            return None
        self.tokens.append((live, self.scratch(inside, base, path, cls, config), existing))
        return self.tokens[-1][1]

    # ------------------------------------------------------------------------------------------------------- loading
    def entries(self) -> Iterator[Entry]:
        yield from super().entries()
        yield from entries_of_copies([(live, copied) for live, _, copied in self.copies], self.model, self.name)
        names = PlainNames(self.model)
        for live, scratch, existing in self.tokens:
            if not scratch.tied:
                where = self.live_paths[id(existing)] if existing is not None else f"{live}.token_adapter"
                yield from entries_of_layer(scratch, self.name, PREFIX + names(where))

    def bias_entries(self) -> Iterator[Entry]:
        """The biases that the adapter trains, under the keys they will have; they are the model's own tensors."""
        yield from entries_of_biases(
            self.model,
            self.name,
            getattr(self.config, "bias", "none"),
            PREFIX,
            around=Counter(live for live, _, existing in self.new if existing is None),
            joined=[existing for _, _, existing in self.new if existing is not None],
            copied=[live for live, *_ in self.copies],
        )

    def fitted(self, entries: list[Entry], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = present_keys(self.config, self.model, self.name, entries, weights)
        return super().fitted(entries, single(entries, weights))

    def entries_of_base(self, entries: list[Entry], weights: dict[str, Tensor]) -> tuple[list[Entry], list[str]]:
        have = {strip(entry.saved) for entry in entries}
        biases = [entry for entry in self.bias_entries() if strip(entry.saved) not in have]
        whole, again = base_entries(self.model, weights, entries + biases)
        return biases + whole, again

    @property
    def built(self) -> list[tuple[str, Layer, Layer | None]]:
        return self.new + self.tokens

    # ----------------------------------------------------------------------------------------------- putting in place
    def commit(self) -> None:
        super().commit()
        for live, scratch, existing in self.tokens:
            if existing is not None:
                existing.adopt(scratch, self.name)
            else:
                self._set(live, TrainableTokensWrapper(scratch))
            self.holders.append(existing or scratch)
        for live, module, copied in self.copies:
            if not isinstance(module, ModulesToSaveWrapper):
                module = ModulesToSaveWrapper(module, self.tuner.context)
                self._set(live, module)
            module.modules_to_save[self.name] = copied
            self.holders.append(module)
        self.ties.commit()
