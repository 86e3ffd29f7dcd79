"""PeftModel: a model with adapters, and what one does with it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import state
from ..core.adapter import Delta, adapter_class
from ..core.bases import Linear
from ..core.config import PeftConfig, check_config
from ..core.errors import AdapterNameError, CheckpointError, ConfigError, PeftWarning, UnsupportedFeatureError
from ..core.files import make_folder, write_checkpoint, write_text
from ..core.layer import layers
from ..core.tuner import Tuner
from . import card, checkpoint, status
from .adapted import AdaptedModel
from .hub import push_to_hub
from .prompt import EMBEDDINGS, Joins, Prompts
from .tuner import BaseTuner, tuner_class

TASKS: dict[str, type[PeftModel]] = {}  # task_type -> class; tasks.py fills it


class PeftModel(AdaptedModel):
    """A model with one or more adapters of one method.

    `model` is changed in place: adapted layers are replaced, everything else is frozen. Attributes: `base_model` (the
    tuner around the model; for prompts the model itself), `peft_config` (configurations by adapter name),
    `active_adapter`, `active_adapters`, `modules_to_save`; for prompts also `prompt_encoder`, `prompt_tokens`,
    `transformer_backbone_name` and `word_embeddings`.

    Raises `PeftError` for anything that does not fit, and then leaves `model` as it was.
    """

    _joins = Joins()  # how prompts are joined to the input

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        options = {"autocast": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        self._setup(model, peft_config, adapter_name, **options)

    def _setup(self, model: Any, config: PeftConfig, name: str, **options: Any) -> None:
        check_config(config)
        self._is_prompt_learning = config.is_prompt_learning
        self.peft_type = config.peft_type
        self.special_peft_forward_args = set(BaseTuner.never_models)
        self._adapters_disabled = False
        self._prompt_configs: dict[str, PeftConfig] = {}  # of prompts only
        self.active_adapter: Any = name
        super()._setup(model, config, name, **options)
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1

    def _around(self, model: Any, config: PeftConfig) -> Any:
        return model if config.is_prompt_learning else tuner_class(config.peft_type).wrap(model)

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return TASKS.get(config.task_type or "", cls)

    @classmethod
    def _check_loads(cls, config: PeftConfig, is_trainable: bool) -> None:
        if config.is_prompt_learning and is_trainable:
            raise ConfigError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")

    def _complete(self, config: Any) -> None:
        """Add to a configuration what the class of the model implies, before it is used."""

    @property
    def _adapters(self) -> Any:
        return Prompts(self) if self._is_prompt_learning else self.base_model

    # -------------------------------------------------------------------------------------------------- configuration
    @property
    def active_peft_config(self) -> PeftConfig:
        """Configuration of the active adapter."""
        name = self.active_adapter if isinstance(self.active_adapter, str) else next(iter(self.active_adapter), None)
        if name not in self.peft_config:
            raise AdapterNameError("The model has no active adapter; add one, or set one with `set_adapter`.")
        return self.peft_config[name]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter takes part in `forward`."""
        return not self._adapters_disabled and bool(self.active_adapters)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's `dtype`, when it has one."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapters in it."""
        return self._adapters.model

    # -------------------------------------------------------------------------------------------------------- adapters
    def _add(self, name: str, config: Any, **options: Any) -> Any:
        if name in self.peft_config:
            raise AdapterNameError(f"Adapter with name '{name}' already exists.")
        check_config(config)
        if config.peft_type != self.peft_type:
            raise ConfigError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {config.peft_type}. "
                "Use get_peft_model(..., mixed=True) for that."
            )
        self._complete(config)
        return super()._add(name, config, **options)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter active, and trainable unless `inference_mode`; all others are frozen."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"Adapter {adapter_name} not found; this model has {sorted(self.peft_config)}.")
        self._adapters.set_adapter(adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, without activating them."""
        self._adapters.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. When it was active, the first that is left becomes active."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"Adapter {adapter_name} does not exist; this model has {sorted(self.peft_config)}.")
        self._adapters.delete_adapter(adapter_name)
        if len(active := self.active_adapters) == 1:
            self.active_adapter = active[0]
        elif adapter_name == self.active_adapter:
            self.active_adapter = active

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model computes what the base model does, bit for bit.

        That is the base model as the adapters found it, or left it: PiSSA and the like change its weights for good.
        """
        if self._adapters.enabled == "irregular":
            warnings.warn("Some adapter layers are enabled and others not; after the context all will be.", PeftWarning)
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            with self._adapters.without_adapters():
                yield
        finally:
            self._adapters_disabled = before

    # --------------------------------------------------------------------------------------------------------- running
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return self._adapters._tell(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `AdaptedModel.forward`."""
        if self._is_prompt_learning:
            return super().forward(*args, **kwargs)
        return Tuner.forward(self.base_model, *args, **kwargs)  # PEFT: what AdaLoRA's adds to the loss is for tasks

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """See `_prepare_model_for_gradient_checkpointing`; kept under PEFT's public name."""
        self._prepare_model_for_gradient_checkpointing(model)

    # ---------------------------------------------------------------------------------------------------------- counts
    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """One record for each adapted layer; see `minipeft.get_layer_status`."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """One record for the whole model; see `minipeft.get_model_status`."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's change of W is additive, and W still there, so that a LoRA could stand for it."""
        found = [adapter for layer in layers(self) for adapter in layer.adapters.values()]
        linear = all(isinstance(adapter.base, Linear) and not adapter.base.needs_weights for adapter in found)
        return bool(found) and linear and all(isinstance(adapter, Delta) and not adapter.rewrites for adapter in found)

    # --------------------------------------------------------------------------------------------------------- prompts
    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The virtual prompt of the active adapter for a batch: embeddings (batch, tokens, dim), or past key values."""
        return Prompts(self).get_prompt(batch_size, task_ids)  # whose cache grows: `max_cache_len` is not needed

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What a checkpoint holds of a prompt: (virtual tokens, dim), on the CPU, with any projection applied."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"Adapter {adapter_name} not found; this model has {sorted(self.peft_config)}.")
        return Prompts(self).tensors(adapter_name)[EMBEDDINGS]

    # ---------------------------------------------------------------------------------------------------------- saving
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters (default: all) as `adapter_config.json` and `adapter_model.safetensors`.

        The adapter "default" goes into `save_directory`, others into a folder of their name in it. Each is replaced in
        one step: a crash leaves the old checkpoint or the new one. `save_embedding_layers`: whole embedding layers too
        ("auto": when they are targeted or resized). Nothing is written unless `is_main_process`.
        `path_initial_model_for_weight_conversion`: a checkpoint of the untrained PiSSA or OLoRA adapter; what is saved
        then is a plain LoRA of twice the rank, for the unchanged base model. `state_dict=` gives the tensors to save.

        Raises `CheckpointError` when `save_directory` is a file and `OSError` when the disk refuses.
        """
        if os.path.isfile(save_directory):
            raise CheckpointError(f"Provided path ({save_directory}) should be a directory, not a file.")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if unknown := [n for n in names if n not in self.peft_config]:
            raise AdapterNameError(f"`selected_adapters` has {unknown}, but this model has {sorted(self.peft_config)}.")
        if not is_main_process:
            return
        make_folder(save_directory)
        for name in names:
            tensors = checkpoint.get_peft_model_state_dict(
                self, kwargs.get("state_dict"), name, save_embedding_layers=save_embedding_layers
            )
            config = copy.deepcopy(self.peft_config[name])
            config.inference_mode = True
            if config.base_model_name_or_path is None:
                of_base = getattr(self.get_base_model(), "__dict__", {})
                config.base_model_name_or_path = of_base.get("name_or_path") or None
                self.peft_config[name].base_model_name_or_path = config.base_model_name_or_path
            if path_initial_model_for_weight_conversion is not None:
                if config.is_prompt_learning:
                    why = "is for PiSSA and OLoRA, not prompts"
                    raise UnsupportedFeatureError(f"path_initial_model_for_weight_conversion {why}.")
                config, tensors = adapter_class(config).convert_to_plain(
                    config, tensors, path_initial_model_for_weight_conversion
                )
            kind = type(self.get_base_model())
            mapping = None
            if config.task_type is None:
                mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            folder = Path(save_directory) if name == "default" else Path(save_directory, name)
            data = state.serialise(tensors, safe_serialization)
            write_checkpoint(folder, config.to_json(mapping), data, safe_serialization)
        self.create_or_update_model_card(save_directory)

    push_to_hub = push_to_hub

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write README.md with the card's metadata, keeping the text and the metadata that are there already.

        Warns, and leaves it as it is, when its metadata cannot be changed without a parser of YAML.
        """
        if (text := card.model_card(self, Path(output_dir, "README.md"))) is not None:
            write_text(output_dir, "README.md", text)
