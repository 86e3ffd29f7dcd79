"""Trained rows of an embedding as a part of another method: its field `trainable_token_indices`."""

from __future__ import annotations

from typing import Any

from ..core.bases import Embedding, Linear, base_of
from ..core.defaults import embedding_path
from ..core.errors import ConfigError, NoMatchingPeftModuleError
from ..core.layer import Layer, TrainableTokensWrapper, walk
from ..core.targets import named, suffixes, unmatched, warn_unmatched
from ..methods.trainable_tokens import TrainableTokens, TrainableTokensConfig


def plan_tokens(plan: Any) -> None:
    """Build, for a plan of another method, the rows of its `trainable_token_indices`."""
    indices = plan.config.trainable_token_indices
    paths = {path: (live, module) for path, live, module in reversed(list(walk(plan.model)))}
    wanted = plan.ties.tokens(indices if isinstance(indices, dict) else {embedding_path(plan.model): indices})
    named_here = {target: [path for path in paths if path and target in suffixes(path)] for target in wanted}
    hint = unmatched({target for target, found in named_here.items() if not found}, paths, [], plan.others)
    if hint and not any(named_here.values()):
        raise NoMatchingPeftModuleError(f"trainable_token_indices names nothing that is in the model: {hint}")
    warn_unmatched("trainable_token_indices", hint)
    for target, tokens in wanted.items():
        for path in named_here[target]:
            if named(path, set(plan.config.modules_to_save or ())):
                raise ConfigError(f"'{path}' is trained in full (modules_to_save): no trainable_token_indices for it.")
            live, module = paths[path]
            joins = module.token_adapter if isinstance(module, TrainableTokensWrapper) else None
            inside = joins.base_layer if joins is not None else module
            base = joins.base if joins is not None else base_of(module)
            taken = isinstance(module, Layer) or live in {at for at, *_ in plan.new}
            if taken or not isinstance(base, (Embedding, Linear)):
                needs = "an embedding that has no other adapter"
                raise ConfigError(f"trainable_token_indices needs {needs}, but '{path}' is not one.")
            config = TrainableTokensConfig(token_indices=list(tokens))
            plan.tokens.append((live, plan.scratch(inside, base, path, TrainableTokens, config), joins))
    plan.ties.follow_tokens(plan, TrainableTokens, lambda tokens: TrainableTokensConfig(token_indices=list(tokens)))
