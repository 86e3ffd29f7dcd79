"""PeftMixedModel: adapters of several methods on one model, several of them active at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core import registry
from ..core.config import PeftConfig, PeftType, check_config
from ..core.errors import AdapterNameError, ConfigError, UnsupportedFeatureError
from ..core.layer import Layer
from .adapted import AdaptedModel
from .tuner import BaseTuner

COMPATIBLE = ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA")
COMPATIBLE_TUNER_TYPES = tuple(PeftType(name) for name in COMPATIBLE if name in PeftType.__members__)


class MixedModel(BaseTuner):
    """A model with adapters of several methods; a layer of one method may stand inside that of another."""

    @property
    def prefix(self) -> str:
        """Empty: the slots begin differently for each method."""
        return ""

    def in_order(self, names: str | Sequence[str]) -> Any:
        """Names of adapters in the order in which they were added, those of no adapter in the end."""
        at = {name: place for place, name in enumerate(self.peft_config)}
        return names if isinstance(names, str) else sorted(names, key=lambda name: at.get(name, len(at)))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        super().set_adapter(self.in_order(adapter_name), inference_mode)

    def _merge(
        self, todo: list[Layer], safe: bool, names: list[str] | None, progress: bool = False, for_good: bool = False
    ) -> None:
        super()._merge(todo, safe, names and self.in_order(names), progress, for_good)


class PeftMixedModel(AdaptedModel):
    """A model with adapters of different methods, several active at once; made by `get_peft_model(..., mixed=True)`.

    Adapters act in the order in which they were added, whatever order `set_adapter` names them in. It cannot be saved:
    save each adapter from a PeftModel of its own. Attributes as those of PeftModel.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        self._setup(model, peft_config, adapter_name)

    def _around(self, model: nn.Module, config: PeftConfig) -> MixedModel:
        return MixedModel.wrap(model)

    active_adapter = property(lambda self: self.base_model.active_adapter, doc="Name or names of the active adapters.")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model computes what the base model does."""
        with self.base_model.without_adapters():
            yield

    # -------------------------------------------------------------------------------------------------------- adapters
    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Nothing is left to do: `add_adapter` copies the configuration's `modules_to_save` itself."""

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters active, and trainable unless `inference_mode`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one or several adapters."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if unknown := sorted(set(names) - set(self.peft_config)):
            raise AdapterNameError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}.")
        for name in names:
            self.base_model.delete_adapter(name)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The model with the active adapters in its weights; see BaseTuner.merge_and_unload."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model without any adapter."""
        return self.base_model.unload(*args, **kwargs)

    def get_layer_status(self) -> Any:
        """Not available: a layer may belong to several methods here. Raises `TypeError`, as PEFT does."""
        raise TypeError(f"get_layer_status is not supported for {type(self).__name__}.")

    def get_model_status(self) -> Any:
        """Not available; raises `TypeError`, as PEFT does."""
        raise TypeError(f"get_model_status is not supported for {type(self).__name__}.")

    # ------------------------------------------------------------------------------------------------ loading, saving
    @classmethod
    def _check_loads(cls, config: PeftConfig, is_trainable: bool) -> None:
        _check_compatible(config)

    def _add(self, name: str, config: Any, **options: Any) -> Any:
        _check_compatible(config)
        return super()._add(name, config, **options)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Not possible, as in PEFT: save each adapter from a PeftModel of its own."""
        raise UnsupportedFeatureError("A PeftMixedModel cannot be saved; save each adapter from its own PeftModel.")

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> None:
        """Not possible, as it cannot be saved."""
        raise UnsupportedFeatureError("A PeftMixedModel cannot be uploaded; do that from a PeftModel of each adapter.")

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Not possible, as in PEFT."""
        raise UnsupportedFeatureError("A PeftMixedModel has no model card, as it cannot be saved.")


def _check_compatible(config: Any) -> None:
    check_config(config)
    ours = config.peft_type in registry.FILES  # what others add is theirs to judge
    if ours and config.peft_type not in COMPATIBLE_TUNER_TYPES:
        kind = getattr(config.peft_type, "value", type(config).__name__)
        raise ConfigError(
            f"The provided `peft_type` '{kind}' is not compatible with the `PeftMixedModel`. "
            f"Compatible types are: {', '.join(t.value for t in COMPATIBLE_TUNER_TYPES)}."
        )
