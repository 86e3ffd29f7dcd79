"""AutoPeftModel: the base model that a saved adapter names, with the adapter on it. Needs transformers to load it.

Which class to load the base model by is only looked up in libraries that the caller trusts (`import_allowlist`).
"""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from ..core.config import PeftConfig, TaskType
from ..core.errors import ConfigError
from ..core.targets import embedding
from ..model.peft_model import PeftModel
from ..model.tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

TRUSTED = ("diffusers", "lerobot", "megatron-core", "transformers")


class AutoPeftModel:
    """For adapters without a task type: the base model's class is the one that was noted when the adapter was saved."""

    _target_class: ClassVar[str | None] = None  # of transformers
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any):
        name = type(self).__name__
        raise OSError(f"{name} cannot be instantiated; call {name}.from_pretrained(pretrained_model_name_or_path).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model, its tokenizer's size if it is saved beside the adapter, and the adapter.

        `import_allowlist`: packages that the base model's class may come from. `kwargs` go to the loading of both.
        Raises `ConfigError` when the class does not fit the adapter's task, or is not to be trusted.
        """
        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        base = cls._base_class(saved, TRUSTED if import_allowlist is None else import_allowlist)
        model = base.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **kwargs)
        cls._fit_vocabulary(model, pretrained_model_name_or_path, revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            model,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_class(cls, saved: PeftConfig, trusted: Any) -> Any:
        if saved.task_type is not None:
            task = TaskType(saved.task_type)
            wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
            if cls._target_class is None:
                raise ConfigError(
                    f"The adapter is for {task.value}: load it by Auto{wanted.__name__}, not {cls.__name__}."
                )
            if cls._target_peft_class is not wanted:
                asked = cls._target_peft_class.__name__
                raise ConfigError(f"Expected target PEFT class: {wanted.__name__}, but you have asked for {asked}.")
            return getattr(_import("transformers"), cls._target_class)
        mapping = saved.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not isinstance(library, str) or not isinstance(name, str):
            raise ConfigError("The adapter's configuration has neither a task_type nor the class of its base model.")
        if not any(library == package or library.startswith(f"{package}.") for package in trusted):
            raise ConfigError(
                f"The adapter wants to import '{library}', which is not in the import allowlist. If you are sure that "
                f"this is safe, pass `import_allowlist=['{library}']`."
            )
        found = getattr(_import(library), name, None)
        if not hasattr(found, "from_pretrained"):
            raise ConfigError(f"'{library}' has no model class '{name}'.")
        return found

    @staticmethod
    def _fit_vocabulary(model: Any, path: Any, revision: str | None, options: dict[str, Any]) -> None:
        """Enlarge the embeddings when tokens were added to the tokenizer that is saved beside the adapter."""
        saved = os.path.exists(os.path.join(path, "tokenizer_config.json"))
        if not saved or (words := embedding(model)) is None:
            return
        kept = {key: options[key] for key in ("token", "trust_remote_code") if key in options}
        tokenizer = _import("transformers").AutoTokenizer.from_pretrained(path, revision=revision, **kept)
        if len(tokenizer) > len(words.weight):
            model.resize_token_embeddings(len(tokenizer))


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ConfigError(f"The base model needs '{library}', which cannot be imported: {error}") from error


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`from_pretrained` loads an adapter together with its base model, a causal language model."""

    _target_class = "AutoModelForCausalLM"
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`from_pretrained` loads an adapter together with its base model, an encoder-decoder language model."""

    _target_class = "AutoModelForSeq2SeqLM"
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`from_pretrained` loads an adapter together with its base model, a classifier of sequences."""

    _target_class = "AutoModelForSequenceClassification"
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`from_pretrained` loads an adapter together with its base model, a classifier of tokens."""

    _target_class = "AutoModelForTokenClassification"
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`from_pretrained` loads an adapter together with its base model, a model that answers questions from a text."""

    _target_class = "AutoModelForQuestionAnswering"
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`from_pretrained` loads an adapter together with its base model, a model without a head."""

    _target_class = "AutoModel"
    _target_peft_class = PeftModelForFeatureExtraction
