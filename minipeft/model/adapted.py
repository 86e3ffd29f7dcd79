"""What a PeftModel and a PeftMixedModel have in common: they come from files, and stand for the model inside."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..core import state
from ..core.adapter import adapter_class
from ..core.config import PeftConfig, check_config
from ..core.errors import PeftWarning
from ..core.files import of_one_version
from ..core.walk import walk
from . import checkpoint, status
from .utils import require_input_grads

M = TypeVar("M", bound="AdaptedModel")


class AdaptedModel(nn.Module):
    """A model with adapters, which knows their configurations by name.

    A class gives `_around` (what `base_model` is), `set_requires_grad` and `_check_loads` (whether it takes an adapter
    from a file at all).
    """

    base_model: Any

    def _setup(self, model: Any, config: PeftConfig, name: str, **options: Any) -> None:
        """Put the first adapter on."""
        self.base_model = self._around(model, config)
        self._add(name, config, **options)
        self.training = model.training
        if getattr(model, "is_gradient_checkpointing", True):
            self._prepare_model_for_gradient_checkpointing(model)

    def _around(self, model: Any, config: PeftConfig) -> Any:
        raise NotImplementedError

    def _add(self, name: str, config: Any, **options: Any) -> Any:
        return self._adapters.add(name, config, **options)

    @property
    def _adapters(self) -> Any:
        """What holds the adapters: the tuner around the model, or what has its methods."""
        return self.base_model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configurations by adapter name."""
        return self._adapters.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self._adapters.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in `forward`."""
        return self._adapters.active_adapters

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[Any]:
        """The class of a model that is loaded with this configuration."""
        return cls

    @classmethod
    def _check_loads(cls, config: PeftConfig, is_trainable: bool) -> None:
        """Raise `ConfigError` where an adapter of this configuration is not to be loaded."""

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that are trained in full and saved with the adapters."""
        names: set[str] = set()
        for config in self.peft_config.values():
            own = getattr(config, "modules_to_save", None) or ()
            names.update([own] if isinstance(own, str) else own)
        return names or None

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
        if not quantised:
            require_input_grads(model)
        return model

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a further, untrained adapter: of the same method, or to a PeftMixedModel. It does not become active.

        `low_cpu_mem_usage` creates it on the meta device, to be loaded. Raises `PeftError` and changes nothing when the
        name is taken or the configuration does not fit.
        """
        self._add(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage, autocast=autocast_adapter_dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with the active adapters; `adapter_names=[...]` gives each sample its own.

        In a mixed batch, "__base__" stands for the bare model. Raises `BatchError` for names that do not fit.
        """
        return self._adapters(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with the active adapters; takes `adapter_names` as `forward` does."""
        return self._adapters.generate(*args, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters; packed 4-bit weights count as the numbers they stand for."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and the percentage."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # --------------------------------------------------------------------------------------------------------- loading
    @classmethod
    def from_pretrained(
        cls: type[M],
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
    ) -> M:
        """`model` with a saved adapter, frozen and in eval mode unless `is_trainable`.

        `model_id` is a folder, or a hub id when huggingface_hub is installed. `config` takes the place of the saved
        configuration. `strict=False` warns about missing and unexpected tensors instead of raising, and
        `ignore_mismatched_sizes=True` about those of another shape, which keep their initial values. No frozen tensor
        of `model` changes, but for whole embedding layers that the checkpoint holds as the model's own
        (`save_embedding_layers`): those are written into it.

        Raises `CheckpointError` when the files cannot be read or do not fit; `model` is then as it was.
        """
        device = kwargs.pop("torch_device", None)
        of_file = (model_id, config, is_trainable, device, ephemeral_gpu_offload, key_mapping)
        config, weights = cls._read(*of_file, renamed=model, **kwargs)
        adapted = object.__new__(cls._class_for(config))
        nn.Module.__init__(adapted)
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast": autocast_adapter_dtype}
        adapted._setup(model, config, adapter_name, weights=weights, **options, **_leniency(kwargs))
        return adapted if is_trainable else adapted.eval()

    @classmethod
    def _read(
        cls,
        model_id: Any,
        config: PeftConfig | None,
        is_trainable: bool,
        device: str | None,
        offload: bool,
        key_mapping: Mapping[str, str] | None,
        renamed: nn.Module | None = None,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The configuration, or the one given, and the tensors of one version of a folder.

        Without a `key_mapping`, that of the model `renamed` counts.
        """

        def read() -> tuple[Any, dict[str, Tensor]]:
            own, mapping = configuration(model_id, config, offload, **kwargs), key_mapping
            cls._check_loads(own, is_trainable)
            if mapping is None and not own.is_prompt_learning:
                mapping = getattr(renamed, "_checkpoint_conversion_mapping", None)
            return own, state.load_peft_weights(model_id, device or "cpu", mapping, **kwargs)

        found, weights = of_one_version(model_id, kwargs.get("subfolder"), read)
        found.inference_mode = not is_trainable
        return found, weights

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
            of_file = (model_id, None, is_trainable, torch_device, ephemeral_gpu_offload, key_mapping)
            config, weights = self._read(*of_file, **kwargs)
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
        beside = [config, *self.peft_config.values()] if self.peft_config else []
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
