"""PeftModel: a model with adapters, and what one does with it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import state
from ..core.adapter import adapter_class
from ..core.config import PeftConfig, check_config
from ..core.errors import AdapterNameError, CheckpointError, ConfigError, PeftWarning, UnsupportedFeatureError
from ..core.files import make_folder, of_one_version, write_checkpoint, write_text
from ..core.targets import embedding
from ..core.tuner import FORWARD_ONLY, Tuner
from ..core.walk import walk
from . import card, checkpoint, on_layers, prompt, status
from .hub import push_to_hub
from .utils import require_grad

TASKS: dict[str, type[PeftModel]] = {}  # task_type -> class; tasks.py fills it


class PeftModel(nn.Module):
    """A model with one or more adapters of one method.

    `model` is changed in place: adapted layers are replaced, everything else is frozen. Attributes: `base_model` (the
    tuner around the model; for prompts the model itself), `peft_config` (configurations by adapter name),
    `active_adapter`, `active_adapters`, `modules_to_save`; for prompts also `prompt_encoder`, `prompt_tokens`,
    `transformer_backbone_name` and `word_embeddings`.

    Raises `PeftError` for anything that does not fit, and then leaves `model` as it was.
    """

    _joins = prompt.Joins()  # how prompts are joined to the input
    base_model: Any

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

    def _setup(
        self,
        model: Any,
        config: PeftConfig,
        name: str,
        **options: Any,
    ) -> None:
        check_config(config)
        self._is_prompt_learning = config.is_prompt_learning
        self.peft_type = config.peft_type
        self.special_peft_forward_args = set(FORWARD_ONLY)
        self._adapters_disabled = False
        self._complete(config)
        self._adapters.setup(self, model, name, config, **options)
        self.training = model.training
        if getattr(model, "is_gradient_checkpointing", True):
            self._prepare_model_for_gradient_checkpointing(model)
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1

    def _complete(self, config: Any) -> None:
        """Add to a configuration what the class of the model implies, before it is used."""

    @property
    def _adapters(self) -> Any:
        """The functions that say what a PeftModel does with its kind of adapter: a module, on_layers or prompt."""
        return prompt if self._is_prompt_learning else on_layers

    # -------------------------------------------------------------------------------------------------- configuration
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configurations by adapter name."""
        return self._adapters.configs(self)

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self._adapters.set_configs(self, value)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in `forward`."""
        return self._adapters.active(self)

    @property
    def active_peft_config(self) -> PeftConfig:
        """Configuration of the active adapter."""
        name = self.active_adapter if isinstance(self.active_adapter, str) else next(iter(self.active_adapter), None)
        if name not in self.peft_config:
            raise AdapterNameError("The model has no active adapter; add one, or set one with `set_adapter`.")
        return self.peft_config[name]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that are trained in full and saved with the adapters."""
        names: set[str] = set()
        for config in self.peft_config.values():
            own = getattr(config, "modules_to_save", None) or ()
            names.update([own] if isinstance(own, str) else own)
        return names or None

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
        return self._adapters.base_of(self)

    # -------------------------------------------------------------------------------------------------------- adapters
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a further, untrained adapter of the same method. It does not become active.

        `low_cpu_mem_usage` creates it on the meta device, to be loaded. Raises `PeftError` and changes nothing when the
        name is taken or the configuration does not fit.
        """
        self._add(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage, autocast=autocast_adapter_dtype)

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
        return self._adapters.add(self, name, config, **options)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter active, and trainable unless `inference_mode`; all others are frozen."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"Adapter {adapter_name} not found; this model has {sorted(self.peft_config)}.")
        self._adapters.activate(self, adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, without activating them."""
        self._adapters.set_requires_grad(self, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. When it was active, the first that is left becomes active."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"Adapter {adapter_name} does not exist; this model has {sorted(self.peft_config)}.")
        self._adapters.delete(self, adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model computes what the base model does, bit for bit.

        That is the base model as the adapters found it, or left it: PiSSA and the like change its weights for good.
        """
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            with self._adapters.disabled(self):
                yield
        finally:
            self._adapters_disabled = before

    # --------------------------------------------------------------------------------------------------------- running
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return self._adapters.telling(self, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with the active adapters; `adapter_names=[...]` gives each sample its own.

        In a mixed batch, "__base__" stands for the bare model. Raises `BatchError` for names that do not fit.
        """
        return self._adapters.forward(self, *args, **kwargs)

    def _run_tuner(self, *args: Any, **kwargs: Any) -> Any:
        return Tuner.forward(self.base_model, *args, **kwargs)  # PEFT: what AdaLoRA's adds to the loss is for tasks

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with the active adapters; takes `adapter_names` as `forward` does."""
        return self._adapters.generate(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)

    def _prepare_model_for_gradient_checkpointing(self, model: Any) -> nn.Module:
        """Let gradients begin at the embeddings' output, as reentrant checkpointing needs."""
        flags = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        quantised = any(getattr(model, flag, False) for flag in flags)
        if not quantised and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif not quantised and (words := embedding(model)) is not None:
            words.register_forward_hook(require_grad)
        return model

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """See `_prepare_model_for_gradient_checkpointing`; kept under PEFT's public name."""
        self._prepare_model_for_gradient_checkpointing(model)

    # ---------------------------------------------------------------------------------------------------------- counts
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters; packed 4-bit weights count as the numbers they stand for."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and the percentage."""
        status.print_parameters(self)

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """One record for each adapted layer; see `minipeft.get_layer_status`."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """One record for the whole model; see `minipeft.get_model_status`."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's change of W is additive, and W still there, so that a LoRA could stand for it."""
        return self._adapters.supports_lora_conversion(self)

    # --------------------------------------------------------------------------------------------------------- prompts
    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The virtual prompt of the active adapter for a batch: embeddings (batch, tokens, dim), or past key values."""
        return prompt.get_prompt(self, batch_size, task_ids, max_cache_len)

    def prompt_state_dict(self, adapter_name: str, save_embedding_layers: bool | str) -> dict[str, Tensor]:
        """The tensors of a prompt's checkpoint, as `get_peft_model_state_dict` gives them."""
        return prompt.prompt_state_dict(self, adapter_name, save_embedding_layers)

    def load_prompt_state_dict(
        self, adapter_name: str, tensors: Mapping[str, Tensor], strict: bool, ignore: bool
    ) -> Any:
        """Write a checkpoint's tensors into a prompt, as `set_peft_model_state_dict` does."""
        return prompt.load_prompt_state_dict(self, adapter_name, tensors, strict, ignore)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What a checkpoint holds of a prompt: (virtual tokens, dim), on the CPU, with any projection applied."""
        return prompt.get_prompt_embedding_to_save(self, adapter_name)

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

    # --------------------------------------------------------------------------------------------------------- loading
    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """`model` with a saved adapter, frozen and in eval mode unless `is_trainable`.

        `model_id` is a folder, or a hub id when huggingface_hub is installed. `config` takes the place of the saved
        configuration. `strict=False` warns about missing and unexpected tensors instead of raising, and
        `ignore_mismatched_sizes=True` about those of another shape, which keep their initial values. No frozen tensor
        of `model` changes, but for whole embedding layers that the checkpoint holds as the model's own
        (`save_embedding_layers`): those are written into it.

        Raises `CheckpointError` when the files cannot be read or do not fit; `model` is then as it was.
        """

        def read() -> tuple[Any, dict[str, Tensor]]:
            own, mapping = configuration(model_id, config, ephemeral_gpu_offload, **kwargs), key_mapping
            _check_trainable(own, is_trainable)
            if mapping is None and not own.is_prompt_learning:
                mapping = getattr(model, "_checkpoint_conversion_mapping", None)
            return own, state.load_peft_weights(model_id, device, mapping, **kwargs)

        device = kwargs.pop("torch_device", None) or "cpu"
        config, weights = of_one_version(model_id, kwargs.get("subfolder"), read)
        config.inference_mode = not is_trainable
        peft_model = TASKS.get(config.task_type or "", cls)._loaded(
            model,
            config,
            adapter_name,
            autocast=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            weights=weights,
            **_leniency(kwargs),
        )
        if not is_trainable:
            peft_model.eval()
        return peft_model

    @classmethod
    def _loaded(cls, model: nn.Module, config: PeftConfig, name: str, **options: Any) -> PeftModel:
        peft_model = cls.__new__(cls)
        nn.Module.__init__(peft_model)
        peft_model._setup(model, config, name, **options)
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Add a saved adapter under `adapter_name`, or load it into the adapter of that name.

        It does not become active. The model goes into eval mode unless `is_trainable`. Further options are those of
        `from_pretrained`. Returns the missing and the unexpected keys. Raises `CheckpointError` when the files do not
        fit; the model is then as it was.
        """
        if adapter_name in self.peft_config:
            weights = state.load_peft_weights(model_id, torch_device or "cpu", key_mapping, **kwargs)
            options = _leniency(kwargs)
            report = checkpoint.set_peft_model_state_dict(
                self, weights, adapter_name, options["ignore"], strict=options["strict"]
            )
        else:

            def read() -> tuple[Any, dict[str, Tensor]]:
                own = configuration(model_id, None, ephemeral_gpu_offload, **kwargs)
                _check_trainable(own, is_trainable)
                return own, state.load_peft_weights(model_id, torch_device or "cpu", key_mapping, **kwargs)

            config, weights = of_one_version(model_id, kwargs.get("subfolder"), read)
            config.inference_mode = not is_trainable
            self._check_new_adapter_config(config)
            options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast": autocast_adapter_dtype}
            report = self._add(adapter_name, config, weights=weights, **options, **_leniency(kwargs))
            if is_trainable:
                self.set_requires_grad(adapter_name)
        if not is_trainable and any(module.training for _, _, module in walk(self)):  # adapters are as their layers
            self.eval()
        return report

    def _check_new_adapter_config(self, config: PeftConfig, is_trainable: bool = False) -> None:
        other: Any
        beside = [config, *self.peft_config.values()] if not config.is_prompt_learning and self.peft_config else []
        for other in (c for c in beside if isinstance(getattr(c, "init_lora_weights", None), str)):
            kind = adapter_class(other)
            if not kind.rewrites and kind.changes_base(other):
                warnings.warn(
                    f"init_lora_weights={other.init_lora_weights!r} changes the base weights, so it should not be used "
                    "beside other adapters. Save it with path_initial_model_for_weight_conversion to make a plain LoRA "
                    "of it.",
                    PeftWarning,
                )
                return


def _check_trainable(config: PeftConfig, is_trainable: bool) -> None:
    if config.is_prompt_learning and is_trainable:
        raise ConfigError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")


def _leniency(options: Mapping[str, Any]) -> dict[str, bool]:
    """What the options of loading say of tensors that do not fit."""
    return {"strict": options.get("strict", True), "ignore": options.get("ignore_mismatched_sizes", False)}


def configuration(model_id: Any, config: PeftConfig | None, offload: bool, **kwargs: Any) -> Any:
    if config is None:
        own = ("torch_device", "strict", "ignore_mismatched_sizes", "use_safetensors")
        options = {k: v for k, v in kwargs.items() if k not in own}
        config = PeftConfig.from_pretrained(model_id, **options)
    check_config(config)
    if hasattr(config, "runtime_config"):
        config.runtime_config.ephemeral_gpu_offload = offload
    elif offload:
        warnings.warn("Ephemeral GPU offloading is not supported for this method. Ignoring.", PeftWarning)
    return config
