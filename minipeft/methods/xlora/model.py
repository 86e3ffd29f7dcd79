"""The model of X-LoRA: it finds out the weights of the LoRA adapters in one pass and uses them in a second.

The base model may be any module whose forward

- takes `output_hidden_states=True`, and then returns an object or a dict with `hidden_states`: a sequence, the last of
  shape (batch, length, hidden_size); it may take `return_dict` as well
- hands (batch, length, ...) to every adapted layer, token by token; an embedding is given (batch, length) indices
- keeps no cache of earlier tokens: `config.use_cache`, if there is one, must be False

Gradient checkpointing needs `use_reentrant=False`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapter import ADAPTERS, Adapter, adapter_class, variants
from ...core.bases import inference_mode_off
from ...core.config import PeftConfig, PeftType
from ...core.errors import (
    AdapterNameError,
    BatchError,
    CheckpointError,
    ConfigError,
    PeftError,
    UnsupportedFeatureError,
    sized,
)
from ...core.files import of_one_version
from ...core.layer import layers
from ...core.plan import check_adapter_name, model_config
from ...core.state import Entry, check, entries_of_module, fill, fitted, incoming, load_peft_weights, strip
from ...model.checkpoint import base_entries
from ...model.prompt import takes
from ...model.tuner import BaseTuner
from .classifier import XLoraClassifier


class Experts(nn.Module):
    """What holds the base model with the LoRA adapters in it, which are called "0", "1", and so on."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class XLoraModel(BaseTuner, method="XLORA"):
    """A model with LoRA adapters that are mixed anew for every token. Attributes: `lora_model`, `xlora_config`,
    `internal_xlora_classifier`, and `internal_xlora_scalings`, the classifier's latest output.
    """

    root: ClassVar[str] = "lora_model.model"
    lora_model: Experts
    xlora_config: Any
    internal_xlora_classifier: XLoraClassifier
    internal_xlora_scalings: Tensor | None = None

    # -------------------------------------------------------------------------------------------------------- building
    def set_model(self, model: nn.Module) -> None:
        self.lora_model = Experts(model)

    @property
    def model(self) -> Any:
        """The base model, with the adapters in it."""
        return self.lora_model.model

    def adapter_class(self, config: Any) -> type[Adapter]:
        return ADAPTERS[PeftType.XLORA][0]

    def check_name(self, name: Any) -> None:
        """The names "0", "1", ... of the LoRA adapters may well be names of modules too."""

    @inference_mode_off()
    @sized()
    def add(
        self,
        name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast: bool = False,
        weights: Any = None,
        strict: bool = True,
        keys: Any = None,
        ignore: bool = False,
    ) -> Any:
        """Load the LoRA adapters that `config` names, and put a classifier beside them."""
        if self.peft_config:
            raise UnsupportedFeatureError("X-LoRA is one adapter for a whole model; call `unload()` before another.")
        check_adapter_name(name, self.model)
        if weights is not None:
            weights = incoming(weights, config)
        loaded = read_adapters(config, name, self.model)
        check_model(self.model)
        trainable = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            for number, (where, own, tensors) in enumerate(loaded):
                with naming(where):
                    super().add(str(number), own, autocast=autocast, weights=tensors)
            report = None
            if weights is not None:  # before the classifier takes memory
                entries = list(entries_of(self.classifier(config, True)))
                weights = fitted(entries, weights)
                report = check(entries, weights, strict=strict, ignore=ignore)
            classifier = self.classifier(config, low_cpu_mem_usage)
            if weights is not None:
                fill(entries_of(classifier), weights)
        except BaseException:
            self.unload()
            self.peft_config = {}
            for parameter, flag in trainable:
                parameter.requires_grad = flag
            raise
        self.internal_xlora_classifier = classifier.train(self.training)
        self.xlora_config = config
        self.peft_config = self.model.peft_config = {name: config, **self.peft_config}
        for number, layer in enumerate(layers(self.model)):
            for expert, adapter in layer.adapters.items():
                adapter.layer_number, adapter.expert = number, int(expert)
        self.set_adapter(name, config.inference_mode)
        before = self.model.register_forward_pre_hook(self.route, with_kwargs=True)
        after = self.model.register_forward_hook(self.forget, always_call=True)
        self.on_unload += [before.remove, after.remove]
        return report

    def classifier(self, config: Any, empty: bool) -> XLoraClassifier:
        """A new classifier for the adapters that are there, in the dtype of the model's first parameter."""
        adapted, first = layers(self.model), next(self.model.parameters())
        device = "meta" if empty else adapted[0].base.device
        with torch.device("meta") if empty else nullcontext():
            return XLoraClassifier(config, len(config.adapters), len(adapted), first.dtype, device)

    def further_entries(self, name: str, prefix: str) -> Iterable[Entry]:
        if self.peft_config[name] is not self.xlora_config:
            return ()
        return entries_of(self.internal_xlora_classifier, prefix.removesuffix("model."))

    # --------------------------------------------------------------------------------------------------------- running
    def route(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the model runs: find out the weights of the adapters, by running it without gradients."""
        now = self.context.open()
        if self._disabled:
            return
        if kwargs.get("past_key_values") is not None:
            raise BatchError("X-LoRA runs the model twice, so it cannot go on from a cache; pass use_cache=False.")
        classifier = self.internal_xlora_classifier
        more = {"output_hidden_states": True} | ({"return_dict": True} if takes(model, "return_dict", True) else {})
        now.scalings = classifier.weights(classifier.constant())
        with torch.no_grad():
            output = model.forward(*args, **{**kwargs, **more})
        states = output.get("hidden_states") if isinstance(output, dict) else getattr(output, "hidden_states", None)
        if states is None:
            raise BatchError(f"X-LoRA needs `hidden_states`, but {type(model).__name__} returned none.")
        self.internal_xlora_scalings = scalings = classifier(states[-1])
        now.scalings = classifier.weights(scalings)

    def forget(self, model: nn.Module, args: Any, output: Any) -> None:
        """After the model has run, or failed: the weights were for this run."""
        self.context.keep_for_backward(output)
        self.context.close()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate, without a cache: each token asks for weights of all tokens."""
        return super().generate(*args, **{**kwargs, "use_cache": False})

    # --------------------------------------------------------------------------------------------- what runs and trains
    @property
    def disabled(self) -> bool:
        """Whether the adapters are switched off."""
        return self._disabled

    @property
    def own_name(self) -> str:
        """The name of the X-LoRA adapter itself."""
        return next(name for name, config in self.peft_config.items() if config is self.xlora_config)

    @property
    def experts(self) -> list[str]:
        """The names of the LoRA adapters: "0", "1", ..."""
        return [str(number) for number in range(len(self.xlora_config.adapters))]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use the X-LoRA adapter, which is the only one that can be named here."""
        if adapter_name not in (self.own_name, [self.own_name]):
            raise AdapterNameError(
                f"X-LoRA uses all its adapters and weighs them: set_adapter takes {self.own_name!r} alone, "
                f"got {adapter_name!r}."
            )
        super().set_adapter(self.experts, inference_mode)
        self.set_requires_grad(self.own_name, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the classifier trainable, or freeze it; the LoRA adapters follow it with `use_trainable_adapters`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.own_name in names:
            self.internal_xlora_classifier.requires_grad_(requires_grad)
            super().set_requires_grad(self.experts, requires_grad and self.xlora_config.use_trainable_adapters)
        super().set_requires_grad([name for name in names if name != self.own_name], requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        trained = next(self.internal_xlora_classifier.parameters()).requires_grad
        super()._enable_adapter_layers(enabled)
        self.set_requires_grad(self.own_name, trained)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refused: the classifier gives a weight to each adapter."""
        raise UnsupportedFeatureError("No adapter of an X-LoRA can be deleted alone; `unload()` removes it whole.")

    # ----------------------------------------------------------------------------------------------------- its settings
    def set_topk_lora(self, value: int | None) -> None:
        """Use only the `value` adapters with the largest weights for each token and layer; None: all."""
        check_top_k(value, len(self.xlora_config.adapters))
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set what all weights are multiplied with."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """What all weights are multiplied with."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set the weight that every adapter has in the first pass; None: one over their number."""
        value = 1 / len(self.xlora_config.adapters) if value is None else value
        self.internal_xlora_classifier.override_scaling_pass_value = self.xlora_config.scaling_pass_value = value

    # ---------------------------------------------------------------------------------------------------------- its log
    def get_latest_scalings(self) -> Tensor | None:
        """What the classifier said last, (batch, length, layers, adapters), with its graph; None before any run."""
        return self.internal_xlora_scalings

    def enable_scalings_logging(self) -> None:
        """From now on, log what the classifier says."""
        self.internal_xlora_classifier.scalings_logging = True

    def disable_scalings_logging(self) -> None:
        """Log no more; what was logged stays."""
        self.internal_xlora_classifier.scalings_logging = False

    def get_scalings_log(self) -> list[Tensor]:
        """What was logged, one tensor (batch, length, layers, adapters) for each run, as a list of the caller's own."""
        return list(self.internal_xlora_classifier.log_scalings)

    def clear_scalings_log(self) -> None:
        """Forget what was logged."""
        self.internal_xlora_classifier.log_scalings.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """What was logged by length: the places in the log, and the tensors."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self.internal_xlora_classifier.log_scalings):
            places, tensors = buckets.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            tensors.append(scalings)
        return buckets

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "internal_xlora_scalings": None}  # part of a graph, which cannot be copied


# ----------------------------------------------------------------------------------------------------------- checking
def read_adapters(config: Any, name: str, model: nn.Module) -> list[tuple[str, Any, dict[str, Tensor]]]:
    """(what to call it, configuration, tensors) of each LoRA adapter. Raises `PeftError` for what cannot be one."""
    if not config.adapters:
        raise ConfigError("`adapters` is empty; X-LoRA needs saved LoRA adapters, as {name: folder}.")
    check_top_k(config.top_k_lora, len(config.adapters))
    if name in map(str, range(len(config.adapters))):
        raise AdapterNameError(f"{name!r} cannot be the name of an X-LoRA adapter: its LoRA adapters are called that.")
    found = []
    for given, folder in config.adapters.items():
        with naming(where := f"Adapter {given!r} of X-LoRA, from '{folder}'"):
            own, weights = of_one_version(folder, None, functools.partial(read_expert, folder))
            found.append((where, own, without_embeddings(weights, model)))
        own.inference_mode = False
    return found


@contextmanager
def naming(what: str) -> Iterator[None]:
    """While it is open, errors say that they are about `what`."""
    try:
        yield
    except PeftError as error:
        raise type(error)(f"{what}: {error}") from error


def read_expert(folder: str) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors of a saved LoRA. Raises `PeftError` for what cannot be one of X-LoRA's."""
    config = PeftConfig.from_pretrained(folder)
    check_expert(config)
    return config, load_peft_weights(folder, "cpu")


def check_expert(config: Any) -> None:
    """Raise `PeftError` unless a configuration is that of a LoRA which changes nothing but the layers it is on."""
    if config.peft_type != PeftType.LORA:
        raise ConfigError(f"it must be a LoRA, but is {config.peft_type}.")
    if asked := variants(config):
        raise UnsupportedFeatureError(f"{asked[0]}={getattr(config, asked[0])!r} cannot be weighed for each token.")
    if adapter_class(config).changes_base(config):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} changes the frozen weights. Save it as a plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    others = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
    for field, value in {"bias": "none", **dict.fromkeys(others)}.items():
        if (getattr(config, field) or value) != value:
            raise UnsupportedFeatureError(f"{field}={getattr(config, field)!r} cannot be weighed for each token.")


def without_embeddings(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors without the model's own embeddings, which stand beside those of an adapter on them."""
    own = {strip(entry.saved): entry.tensor for entry in base_entries(model, tensors, ())[0]}
    for key, value in tensors.items():
        there = own.get(strip(key))
        if there is not None and not (there.shape == value.shape and torch.equal(there, value.to(there))):
            raise CheckpointError(f"it holds '{key}' with other values than the model; adapters of X-LoRA share one.")
    return {key: value for key, value in tensors.items() if strip(key) not in own}


def check_model(model: nn.Module) -> None:
    """Raise `ConfigError` unless a model can be run for its hidden states, without a cache."""
    if model_config(model).get("use_cache"):
        raise ConfigError("`use_cache` must be False in the model's config: X-LoRA runs the model twice.")
    if not takes(model, "output_hidden_states", further=True):
        raise ConfigError(f"X-LoRA needs a model that takes `output_hidden_states`; {type(model).__name__} does not.")


def check_top_k(value: Any, count: int) -> None:
    """Raise `ConfigError` unless so many of `count` adapters can be chosen."""
    if value is not None and not (isinstance(value, int) and 1 <= value <= count):
        raise ConfigError(f"`top_k_lora` must be None or from 1 to {count}, the number of adapters; got {value}.")


def entries_of(classifier: nn.Module, prefix: str = "base_model.") -> Iterator[Entry]:
    """What a checkpoint holds of the classifier."""
    path = f"{prefix}internal_xlora_classifier"
    return entries_of_module(classifier, path, path)
