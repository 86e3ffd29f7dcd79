"""The task classes: PeftModels whose `forward` has the arguments of a kind of transformers model.

They add what a task needs to the adapters: a classifier's head is trained in full beside them, labels are padded where
virtual tokens stand in front of the input, and text generation begins with the prompt. Nothing here needs transformers;
prompt.py says what a model must offer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.config import PeftConfig, TaskType
from .adapted import AdaptedModel
from .peft_model import TASKS, PeftModel
from .prompt import Joins


class _Task(PeftModel):
    """What the task classes share."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _forward(self, arguments: dict[str, Any]) -> Any:
        """Run with a forward's own `locals()`, less what is None; `task_ids` are for methods that tell tasks apart."""
        given = {name: value for name, value in arguments.items() if value is not None and name != "self"}
        kwargs = given.pop("kwargs")
        if "task_ids" not in self._adapters.own_inputs:
            given.pop("task_ids", None)
        return AdaptedModel.forward(self, **given, **kwargs)


class _Labelled(_Task):
    """The forward of three of them."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """The model's output, for `input_ids` (batch, length) and `labels`, whose shape is the task's."""
        return self._forward(locals())


class _Head(_Task):
    """A backbone with a classifying head, which is trained in full beside every adapter."""

    head_names: ClassVar[tuple[str, ...]] = ("classifier", "score")

    def _complete(self, config: Any) -> None:
        if hasattr(config, "modules_to_save"):
            own = config.modules_to_save
            own = [own] if isinstance(own, str) else list(own or ())
            config.modules_to_save = own + [name for name in self.head_names if name not in own]

    @property
    def cls_layer_name(self) -> str:
        """Name of the head, which is a child of the base model."""
        names = self.modules_to_save or self.head_names
        for name, _ in self.base_model.named_children():
            if any(part in name for part in names):
                return name
        raise AttributeError("cls_layer_name")


class PeftModelForSequenceClassification(_Head, _Labelled):
    """One label for each sequence, `labels` (batch,) or (batch, labels); the loss is that of `config.problem_type`."""

    _joins = Joins(token_types=True, head=True)


class PeftModelForTokenClassification(_Head, _Labelled):
    """One label for each token, `labels` (batch, length)."""

    _joins = Joins(labels=True, token_types=True, head=True)

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig = None,  # type: ignore[assignment]
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)


class PeftModelForQuestionAnswering(_Head):
    """Where in the sequence an answer begins and where it ends.

    Unlike PEFT's, `forward` hands `token_type_ids` and `position_ids` on to the model, so that merging changes nothing.
    """

    _joins = Joins(token_types=True, head=True)
    head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """The model's output, for `input_ids` (batch, length), `start_positions` and `end_positions` (batch,)."""
        return self._forward(locals())


class PeftModelForFeatureExtraction(_Task):
    """Hidden states."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """The model's output, for `input_ids` (batch, length)."""
        return self._forward(locals())


PREPARING = threading.Lock()


class Preparing:
    """In the place of a model's `prepare_inputs_for_generation` while prompts are generating: each thread has its own.

    `of_base` is what it stands for; `before`, what the model itself held under that name, beside its class.
    """

    def __init__(self, of_base: Any, before: Any):
        self.of_base, self.before, self.here, self.users = of_base, before, threading.local(), 0

    def __call__(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        given = {} if task_ids is None else {"task_ids": task_ids}
        return (getattr(self.here, "by", None) or self.of_base)(*args, **given, **kwargs)


class _Generating(_Task):
    """A model that generates text by `generate`, which calls `prepare_inputs_for_generation` for every token."""

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The base model's own method, also while `generate` has something in its place."""
        method = self.get_base_model().prepare_inputs_for_generation
        return method.of_base if isinstance(method, Preparing) else method

    @property
    def _prompting(self) -> bool:
        return self._is_prompt_learning and self.has_active_enabled_adapter

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with the active adapters; `adapter_names` and `task_ids` are as in `forward`."""
        base: Any = self.get_base_model()
        if "generation_config" in self.__dict__:  # was set on this model
            base.generation_config = self.generation_config
        if not self._prompting:
            return super().generate(*args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        with self._adapters.mixed(names), self._in_place_of_base(base):
            return base.generate(*args, **self._adapters.prepare_encoder(kwargs))

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """What the base model is called with for the next token, the prompt included."""
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        if self._prompting:
            return self._adapters.prepare_token(inputs, kwargs.get("attention_mask"), task_ids)
        if "task_ids" in self._adapters.own_inputs:
            inputs["task_ids"] = task_ids
        return inputs

    @contextmanager
    def _in_place_of_base(self, base: nn.Module) -> Iterator[None]:
        """While it is open, what `base` generates in this thread is prepared by this model."""
        key, own = "prepare_inputs_for_generation", base.__dict__
        with PREPARING:
            if not isinstance(own.get(key), Preparing):
                own[key] = Preparing(base.prepare_inputs_for_generation, own.get(key))
            preparing = own[key]
            preparing.users += 1
        before, preparing.here.by = getattr(preparing.here, "by", None), self.prepare_inputs_for_generation
        try:
            yield
        finally:
            preparing.here.by = before
            with PREPARING:
                preparing.users -= 1
                if not preparing.users:
                    del own[key]
                    if preparing.before is not None:
                        own[key] = preparing.before


class PeftModelForCausalLM(_Generating, _Labelled):
    """A decoder that predicts the next token of `labels` (batch, length)."""

    _joins = Joins(labels=True)


class PeftModelForSeq2SeqLM(_Generating):
    """An encoder and a decoder."""

    _joins = Joins(labels=True, decoder=True)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        decoder_inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        """The model's output, for `input_ids` (batch, length) and `labels` (batch, other length)."""
        return self._forward(locals())

    def generate(self, **kwargs: Any) -> Any:
        """The base model's `generate` with the active adapters; prompts need `input_ids` or `inputs_embeds`."""
        return super().generate(**kwargs)


TASKS |= {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = TASKS
