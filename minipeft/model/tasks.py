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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import PeftConfig, TaskType
from ..core.errors import BatchError
from . import prompt
from .peft_model import TASKS, PeftModel


class Output(dict):
    """What a head returns on a model that is not of transformers: names and values, the values as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Task(PeftModel):
    """What the task classes share."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _forward(self, arguments: dict[str, Any]) -> Any:
        """Run with a forward's own `locals()`, less what is None; `task_ids` are for methods that tell tasks apart."""
        given = {name: value for name, value in arguments.items() if value is not None and name != "self"}
        kwargs = given.pop("kwargs")
        if not self._adapters.takes_task_ids(self):
            given.pop("task_ids", None)
        return PeftModel.forward(self, **given, **kwargs)

    def _run_tuner(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


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
    output_names: ClassVar[tuple[str, ...]] = ("logits",)
    output_class: ClassVar[str]  # of transformers
    pooled: ClassVar[bool] = False  # the head reads the backbone's second output, if it is a tensor

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

    def _with_head(self, inputs: dict[str, Any]) -> Any:
        """Run with a cache in `past_key_values`: the whole model if it takes one, else its backbone, then its head."""
        base: Any = self.base_model
        if prompt.takes(base, "past_key_values"):
            return base(**inputs)
        backbone = base.get_submodule(str(self.transformer_backbone_name))
        targets = [inputs.pop(name, None) for name in self.target_names]
        wanted = inputs.pop("return_dict", None)
        outputs = backbone(**inputs)
        states = tuple(outputs.values()) if isinstance(outputs, dict) else outputs
        states = states if isinstance(states, tuple) else (states,)
        hidden = states[0]
        if self.pooled and len(states) > 1 and isinstance(states[1], Tensor):
            hidden = states[1]
        hidden = base.dropout(hidden) if "dropout" in base._modules else hidden
        results, loss = self._results(base.get_submodule(self.cls_layer_name)(hidden), *targets)
        if not (getattr(getattr(base, "config", None), "return_dict", True) if wanted is None else wanted):
            return (() if loss is None else (loss,)) + results + states[2:]
        cls: Any = Output
        if prompt.of_transformers(base):
            from transformers import modeling_outputs

            cls = getattr(modeling_outputs, self.output_class)
        more = {name: getattr(outputs, name, None) for name in ("hidden_states", "attentions")}
        return cls(loss=loss, **dict(zip(self.output_names, results)), **more)

    target_names: ClassVar[tuple[str, ...]] = ("labels",)

    def _results(self, logits: Tensor, *targets: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The head's outputs and the loss, if there are targets."""
        raise NotImplementedError

    def _classes(self, logits: Tensor) -> int:
        return getattr(self.base_model, "num_labels", logits.shape[-1])


class PeftModelForSequenceClassification(_Head, _Labelled):
    """One label for each sequence, `labels` (batch,) or (batch, labels); the loss is that of `config.problem_type`."""

    _joins = prompt.Joins(token_types=True, head=True)
    output_class = "SequenceClassifierOutput"
    pooled = True

    def _results(self, logits: Tensor, *targets: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        (labels,) = targets
        if labels is None:
            return (logits,), None
        count = self._classes(logits)
        config: Any = getattr(self.base_model, "config", None)
        problem = getattr(config, "problem_type", None)
        if problem is None:
            of_classes = "single" if labels.dtype in (torch.long, torch.int) else "multi"
            problem = "regression" if count == 1 else f"{of_classes}_label_classification"
            if hasattr(config, "problem_type"):
                config.problem_type = problem
        if problem == "regression":
            squeeze = count == 1
            loss = F.mse_loss(logits.squeeze(), labels.squeeze()) if squeeze else F.mse_loss(logits, labels)
        elif problem == "single_label_classification":
            loss = F.cross_entropy(logits.view(-1, count), labels.view(-1))
        elif problem == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        else:
            raise BatchError(f"config.problem_type {problem!r} has no loss.")
        return (logits,), loss


class PeftModelForTokenClassification(_Head, _Labelled):
    """One label for each token, `labels` (batch, length)."""

    _joins = prompt.Joins(labels=True, token_types=True, head=True)
    output_class = "TokenClassifierOutput"

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig = None,  # type: ignore[assignment]
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _results(self, logits: Tensor, *targets: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        (labels,) = targets
        loss = None if labels is None else F.cross_entropy(logits.view(-1, self._classes(logits)), labels.view(-1))
        return (logits,), loss


class PeftModelForQuestionAnswering(_Head):
    """Where in the sequence an answer begins and where it ends.

    Unlike PEFT's, `forward` hands `token_type_ids` and `position_ids` on to the model, so that merging changes nothing.
    """

    _joins = prompt.Joins(token_types=True, head=True)
    head_names = ("qa_outputs",)
    output_names = ("start_logits", "end_logits")
    output_class = "QuestionAnsweringModelOutput"
    target_names = ("start_positions", "end_positions")

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

    def _results(self, logits: Tensor, *targets: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        sides = tuple(side.squeeze(-1).contiguous() for side in logits.split(1, dim=-1))
        loss = None
        if all(places is not None for places in targets):
            outside = logits.shape[1]  # positions beyond the input count as none
            losses = [
                F.cross_entropy(side, places.view(-1).clamp(0, outside), ignore_index=outside)
                for side, places in zip(sides, targets)
                if places is not None
            ]
            loss = (losses[0] + losses[1]) / 2
        return sides, loss


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
        base = self.get_base_model()
        if "generation_config" in self.__dict__:  # was set on this model
            base.generation_config = self.generation_config
        if not self._prompting:
            return super().generate(*args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        with prompt.mixed(self, names), self._in_place_of_base(base):
            return self._generate_with_prompt(base, *args, **kwargs)

    def _generate_with_prompt(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return base.generate(*args, **kwargs)

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

    def _prepared(self, task_ids: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        if not self._is_prompt_learning and self._adapters.takes_task_ids(self):
            inputs["task_ids"] = task_ids
        return inputs


class PeftModelForCausalLM(_Generating, _Labelled):
    """A decoder that predicts the next token of `labels` (batch, length)."""

    _joins = prompt.Joins(labels=True)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """What the base model is called with for the next token, the prompt included."""
        inputs = self._prepared(task_ids, args, kwargs)
        if not self._prompting:
            return inputs
        return prompt.prepare_generation(self, inputs, kwargs.get("attention_mask"), task_ids)


class PeftModelForSeq2SeqLM(_Generating):
    """An encoder and a decoder."""

    _joins = prompt.Joins(labels=True, decoder=True)

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

    def _generate_with_prompt(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return base.generate(**prompt.prepare_encoder(self, kwargs))

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """What the base model is called with for the next token; a prefix goes into the decoder's empty cache."""
        inputs = self._prepared(task_ids, args, kwargs)
        if not self._prompting:
            return inputs
        return prompt.prepare_decoder(self, inputs)


TASKS |= {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = TASKS
