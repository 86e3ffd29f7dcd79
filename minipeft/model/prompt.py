"""Prompt learning: virtual tokens that are trained in front of a frozen model's input.

A `Prompt` holds the virtual tokens of one adapter. It gives either embeddings, which are put in front of the input's
embeddings, or keys and values (a cache), which every attention layer sees before the input's own. `Prompts`, all those
of a PeftModel, is the one place where they meet the model's inputs (`joined`, and `prepare_token` for generating):

    prompt gives    inputs_embeds       past_key_values    attention_mask     position_ids    labels
    embeddings      [prompt, input]     -                  [1 .. 1, mask]     dropped         [-100 .. -100, labels]
    keys, values    as they are         the prompt         [1 .. 1, mask]     + tokens        as they are

The model may be any module that keeps this protocol (transformers' models do; `conformance/models/language_models.py`
has a small decoder, encoder and encoder-decoder that do no more):

- its word embedding is found by `get_input_embeddings()` or is its first `nn.Embedding`
- `forward` takes `input_ids` (batch, length) and `attention_mask` (batch, length), where 0 hides a token
- for embeddings, `forward` takes `inputs_embeds` (batch, length, dim) in the place of `input_ids`
- for keys and values, `forward` takes `past_key_values`: for each attention layer a pair (keys, values), each of shape
  (batch, heads, tokens, head dim); `attention_mask` then has tokens + length columns. A classifier that does not take
  `past_key_values` may have one child that does, its backbone, to which it hands `attention_mask` on
- an encoder-decoder takes `decoder_input_ids`, `decoder_attention_mask` and `decoder_inputs_embeds` in the same way;
  embeddings go in front of the encoder's input, keys and values to the self-attention of the decoder
- to generate, a decoder has `generate`, which calls its own `prepare_inputs_for_generation` for every token with
  `input_ids`, `past_key_values` and `attention_mask`, and runs on the dict that it returns; an encoder-decoder's is
  given `decoder_input_ids` and the `encoder_outputs` of the one time that its encoder ran
- CPT sets `loss` on an output that has `logits`; no other prompt looks at what the model returns
- sizes are read from `model.config` (an object or a dict; names as in transformers), or given in the configuration

transformers is imported only for one of its own models, whose caches are objects instead of tuples.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import state
from ..core.bases import inference_mode_off
from ..core.batch import BASE
from ..core.config import PeftConfig, PeftType, PromptLearningConfig, TaskType
from ..core.errors import (
    BatchError,
    CheckpointError,
    ConfigError,
    PeftWarning,
    UnsupportedFeatureError,
    sized,
)
from ..core.layer import Context, adapted
from ..core.offload import device_of, loaded, onload
from ..core.plan import check_adapter_name, model_config, of_transformers
from ..core.targets import embedding
from ..core.walk import put_at
from . import checkpoint
from .wrappers import ModulesToSaveWrapper, copied_modules, copies_in

PROMPTS: dict[PeftType, type[Prompt]] = {}  # filled as the prompt classes are defined
EMBEDDINGS = "prompt_embeddings"  # the key of a saved prompt
PREFIX = "base_model."  # before the names of the base model's modules, in keys
IGNORED = -100  # a label that no loss counts

# Turns the keys and values of a prompt, a list of (2, batch, heads, tokens, head dim) by layer, into the cache of a
# model whose `config.model_type` is the key, where that is neither a tuple of pairs nor transformers' DynamicCache.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}


class Prompt(nn.Module):
    """The virtual tokens of one adapter.

    `embedding.weight` (tokens, width) is what a checkpoint holds. Subclasses are built from a completed configuration,
    and from the model's word embedding when they say so by `reads_words`.
    """

    gives_cache: ClassVar[bool] = False  # forward gives keys and values of all layers, not embeddings
    reads_words: ClassVar[bool] = False  # built from the word embedding too
    by_task: ClassVar[bool] = False  # forward takes `task_ids` (batch,) too
    before_decoder: ClassVar[bool] = False  # the second half of the tokens stands in front of a decoder's input
    computed: bool = False  # by a network, which is trained and not saved

    embedding: nn.Embedding

    def __init_subclass__(cls, config: type[PeftConfig] | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if config is not None:
            assert config._method is not None
            PROMPTS[config._method] = cls

    def forward(self, indices: Tensor) -> Tensor:
        """Virtual tokens (batch, tokens, width) for their numbers (batch, tokens)."""
        raise NotImplementedError

    def saved(self, indices: Tensor) -> dict[str, Tensor]:
        """The tensors of a checkpoint by key; `indices` (1, tokens) are the numbers of all tokens."""
        return {EMBEDDINGS: self(indices)[0]}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's tensors, which are known to fit. Raises `CheckpointError` if it can hold none."""
        if self.computed:
            raise CheckpointError(
                "A prompt is saved without the network that makes it, so it cannot be loaded into one that is being "
                "trained; nothing was loaded. Load it with inference_mode=True."
            )
        with torch.no_grad():
            self.embedding.weight.copy_(tensors[EMBEDDINGS])

    def run(self, model: Any, inputs: dict[str, Any], unlabelled: int) -> Any:
        """The model's output for the joined inputs, whose labels still lack those of `unlabelled` virtual tokens."""
        if unlabelled and "labels" in inputs:
            inputs["labels"] = pad_labels(inputs["labels"], unlabelled)
        return model(**inputs)


class Prefix(Prompt):
    """Keys and values of all layers for each virtual token."""

    gives_cache = True

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take over keys and values (tokens, layers * 2 * dim). Raises `ConfigError` when they do not fit."""
        if prompt_embeddings.shape != (shape := tuple(self.embedding.weight.shape)):
            raise ConfigError(f"Expected `prompt_embeddings` of shape {shape}, got {tuple(prompt_embeddings.shape)}.")
        if not torch.isfinite(prompt_embeddings).all():
            raise ConfigError("`prompt_embeddings` has NaN or infinite values.")
        self.load({EMBEDDINGS: prompt_embeddings})


@dataclass(frozen=True)
class Joins:
    """How a task takes a prompt, beside what all tasks share."""

    labels: bool = False  # there is one label for each token
    token_types: bool = False  # the model may read `token_type_ids`
    decoder: bool = False  # an encoder and a decoder
    head: bool = False  # a backbone with a head: a cache may have to be given to the backbone


class GivesCache:
    """A hook before a backbone: in a pass with a prompt, each of its runs has a cache of its own that begins with that.

    It stays there: torch does not let other threads run while one takes a hook away. In other passes it does nothing.
    """

    def __init__(self, context: Context):
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        make = getattr(self.context.now, "make_cache", None)
        return None if make is None else (args, {**kwargs, "past_key_values": make()})


class Prompts:
    """The prompts of a PeftModel: with the methods that it calls on a tuner, when its adapters are on layers.

    All of them stand in the PeftModel itself, so this is made anew whenever it is needed.
    """

    enabled = True  # the layers of a tuner may differ in that; there are none here

    def __init__(self, peft_model: Any):
        self.peft_model = peft_model

    @property
    def model(self) -> Any:
        """The base model."""
        return self.peft_model.base_model

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations by adapter name."""
        return self.peft_model._prompt_configs

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.peft_model._prompt_configs = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active prompts: one, or none."""
        names = self.peft_model.active_adapter
        return [names] if isinstance(names, str) else list(names)

    @property
    def active(self) -> Prompt:
        """The active prompt."""
        return self.peft_model.prompt_encoder[self.active_adapters[0]]

    @property
    def own_inputs(self) -> set[str]:
        """Arguments of a call that are for prompts, and that the model does not take."""
        own = self.peft_model.special_peft_forward_args
        return own | {"task_ids"} if self.peft_model.has_active_enabled_adapter else own

    def _for_model(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        own = self.own_inputs
        return {name: value for name, value in kwargs.items() if name not in own}

    @inference_mode_off()
    @sized()
    def add(
        self,
        name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast: bool = True,
        weights: Mapping[str, Tensor] | None = None,
        strict: bool = True,
        ignore: bool = False,
    ) -> Any:
        """Build the prompt `name` for `config`, load `weights` into it (a checkpoint's tensors), and put it in place.

        What the configuration leaves open is filled in from the model. On any error nothing is changed. Returns what
        loading reports, or None. A prompt is always made where it runs, in its own dtype: `low_cpu_mem_usage` and
        `autocast` mean nothing to it.
        """
        base = self.model
        check_adapter_name(name, base)
        if config.peft_type not in PROMPTS:
            raise UnsupportedFeatureError(f"peft_type {config.peft_type!r} is not in this release of minipeft.")
        cls = PROMPTS[config.peft_type]
        backbone = _backbone(base)
        words = word_embeddings(base, backbone)
        config_now = completed(config, base, words, cls, self.peft_model._joins.decoder)
        if cls.gives_cache and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            kind = config.peft_type.value
            raise ConfigError(f"{kind} does not work with gradient checkpointing: it lives in the cache.")
        if cls.gives_cache and not _takes_cache(base, backbone if self.peft_model._joins.head else None):
            raise UnsupportedFeatureError(
                f"{type(base).__name__} does not take `past_key_values`, so {config.peft_type.value} cannot reach it."
            )
        if cls.reads_words and words is None:
            raise ConfigError("The model has no word embedding; give it a method `get_input_embeddings`.")
        given = (config_now, words) if cls.reads_words else (config_now,)
        if weights is not None:
            weights = state.incoming(weights, config_now)
            _check_sizes(cls, given, weights)
        prompt = cls(*given).to(device_of(base))
        tokens = torch.arange(config_now.num_virtual_tokens * config_now.num_transformer_submodules)
        copies = copied_modules(base, config_now, loading=weights is not None)
        report = None
        if weights is not None:
            beside = [(live, copied) for live, _, copied in copies]
            report = _load(base, prompt, _rows(prompt, tokens, config_now), name, beside, weights, strict, ignore)
        # from here on nothing can fail
        vars(config).update(vars(config_now))
        if "prompt_encoder" not in self.peft_model._modules:
            self.peft_model.prompt_encoder = nn.ModuleDict().train(base.training)
            self.peft_model.prompt_tokens = {}
            self.peft_model.prompt_context = Context()
            if backbone is not None and self.to_backbone(cls):
                give = GivesCache(self.peft_model.prompt_context)
                base.get_submodule(backbone).register_forward_pre_hook(give, with_kwargs=True)
        trained = {id(p) for _, _, wrapper in adapted(base) for p in wrapper.modules_to_save.parameters()}
        for parameter in base.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad = False
        for live, module, copied in copies:
            wrapper: Any = module
            if not isinstance(module, ModulesToSaveWrapper):
                wrapper = ModulesToSaveWrapper(module, self.peft_model.prompt_context)
                wrapper.train(module.training)
                put_at(base, live, wrapper)
            wrapper.modules_to_save[name] = copied
        if backbone is not None:
            self.peft_model.transformer_backbone_name = backbone
        if words is not None:
            self.peft_model.word_embeddings = words
        self.peft_model.prompt_tokens[name] = tokens
        self.peft_model.prompt_encoder[name] = prompt.train(base.training)
        self.peft_config[name] = config
        first = len(self.peft_config) == 1
        for _, _, wrapper in adapted(base):
            if first and name in wrapper.modules_to_save:
                wrapper.set_adapter(name, config.inference_mode)
            elif name in wrapper.modules_to_save:
                wrapper.set_requires_grad(name, False)
        return report

    def set_adapter(self, name: str, inference_mode: bool) -> None:
        """Switch the modules that are trained beside the prompts to those of adapter `name`."""
        for _, _, wrapper in adapted(self.model):
            wrapper.set_adapter(name, inference_mode)

    def set_requires_grad(self, names: str | Sequence[str], requires_grad: bool) -> None:
        """Not possible, as in PEFT."""
        method = PeftType(self.peft_model.peft_type).value
        raise TypeError(f"Setting `requires_grad` is not supported for prompt learning ({method}).")

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within the context the modules that are trained beside the prompts are those of the base model."""
        wrappers = [wrapper for _, _, wrapper in adapted(self.model)]
        before = [wrapper.disable_adapters for wrapper in wrappers]
        for wrapper in wrappers:
            wrapper.enable_adapters(False)
        try:
            yield
        finally:
            for wrapper, off in zip(wrappers, before):
                wrapper.enable_adapters(not off)

    def delete_adapter(self, name: str) -> None:
        """Delete a prompt. When it was active, the first that is left becomes active."""
        for _, _, wrapper in adapted(self.model):
            wrapper.delete_adapter(name)
        del self.peft_config[name], self.peft_model.prompt_encoder[name], self.peft_model.prompt_tokens[name]
        if name in self.active_adapters:
            rest = list(self.peft_config)
            self.peft_model.active_adapter = rest[0] if rest else []
            if rest:
                self.set_adapter(rest[0], False)
                warnings.warn(
                    f"Adapter {name} was active which is now deleted. Setting active adapter to {rest[0]}.", PeftWarning
                )

    # ------------------------------------------------------------------------------------------------------ checkpoints
    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a prompt's checkpoint, without the modules that are trained beside it."""
        prompt = self.peft_model.prompt_encoder[name]
        with torch.no_grad(), onload(prompt):
            saved = prompt.saved(_rows(prompt, self.peft_model.prompt_tokens[name], self.peft_config[name]))
        return {key: tensor.detach().cpu() for key, tensor in saved.items()}

    def state_dict(self, name: str, save_embedding_layers: bool | str) -> dict[str, Tensor]:
        """The tensors of a prompt's checkpoint, and those of the modules that are trained or saved beside it."""
        base, saved = self.model, self.tensors(name)
        copies = list(checkpoint.entries_of_copies(copies_in(base, name), base, name, PREFIX))
        whole = checkpoint.embeddings_to_save(self.peft_model, name, save_embedding_layers, base, PREFIX)
        with state.onloaded(self.peft_model, copies + whole):
            saved |= {entry.saved: entry.tensor.detach() for entry in copies}
            return {**{entry.saved: entry.tensor.detach() for entry in whole}, **saved}

    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor], strict: bool, ignore: bool = False) -> Any:
        """Write a checkpoint's tensors into a prompt, or nothing: `CheckpointError` if they do not fit."""
        prompt, copies = self.peft_model.prompt_encoder[name], copies_in(self.model, name)
        rows = _rows(prompt, self.peft_model.prompt_tokens[name], self.peft_config[name])
        tensors = state.incoming(tensors)
        with onload(prompt, *(module for _, module in copies), keep=True):
            return _load(self.model, prompt, rows, name, copies, tensors, strict, ignore)

    # ---------------------------------------------------------------------------------------------------------- running
    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """The prompt of the active adapter for a batch: embeddings (batch, tokens, dim), or past key values.

        In a mixed batch every sample has the prompt of its own adapter.
        """
        config = self.peft_model.active_peft_config
        virtual = self.virtual_tokens(batch_size, task_ids)
        if not PROMPTS[config.peft_type].gives_cache:
            return virtual
        dtype = self.peft_model.base_model_torch_dtype or _dtype(self.model)
        return as_cache(self.model, virtual.to(dtype), config)

    def virtual_tokens(self, batch_size: int, task_ids: Tensor | None) -> Tensor:
        def of(name: str, count: int, tasks: Tensor | None) -> Tensor:
            prompt = self.peft_model.prompt_encoder[name]
            rows = _rows(prompt, self.peft_model.prompt_tokens[name], self.peft_config[name])
            if prompt.by_task and tasks is None:
                raise BatchError("This prompt differs by task: `task_ids` must be given, one number for each sample.")
            with loaded(prompt):
                if prompt.by_task and tasks is not None:
                    return prompt(rows.expand(count, -1), tasks.to(rows.device))
                return prompt(rows).expand(count, -1, -1)  # (batch, tokens, width)

        groups = self.peft_model.prompt_context.now.groups(batch_size, None)
        if groups is None:
            return of(self.active_adapters[0], batch_size, task_ids)
        parts, order = [], []
        for name, samples in groups.items():
            parts.append(of(name, len(samples), None if task_ids is None else task_ids[samples]))
            order += samples
        if len({part.shape[1:] for part in parts}) > 1:
            raise BatchError(f"Prompts of {sorted(groups)} differ in length, so they cannot stand in one batch.")
        return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]

    @contextmanager
    def mixed(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """While it is open, `adapter_names` gives every sample of the batch its prompt."""
        if adapter_names is None:
            yield
            return
        if self.peft_model.training:
            raise BatchError("Cannot pass `adapter_names` when the model is in training mode.")
        if BASE in adapter_names:
            raise BatchError(f"'{BASE}' cannot stand in a batch with prompts: without one a sample is shorter.")
        if unknown := sorted(set(adapter_names) - set(self.peft_config)):
            raise BatchError(f"Trying to infer with non-existing adapter(s): {', '.join(map(str, unknown))}")
        with self.peft_model.prompt_context.telling(adapter_names=list(adapter_names)):
            yield

    def _tell(self, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Nothing: the call itself tells what it says of each sample."""
        return nullcontext()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with the active prompt, or without any when prompts are off."""
        if self.peft_model.has_active_enabled_adapter:
            return self.joined(*args, **kwargs)
        return self.model(*args, **self._for_model(kwargs))

    def joined(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward with the active prompt. Raises `BatchError` for inputs that it cannot be joined to."""
        config, joins = self.peft_model.active_peft_config, self.peft_model._joins
        prompt = self.active
        shown = inputs_embeds if input_ids is None else input_ids
        if shown is None:
            raise BatchError("A prompt needs an input to stand in front of: give `input_ids` or `inputs_embeds`.")
        count, tokens = len(shown), config.num_virtual_tokens
        inputs = {**kwargs, "attention_mask": attention_mask, "labels": labels}
        _positions(inputs, prompt, tokens, joins.token_types)
        make = functools.partial(self.get_prompt, count, task_ids)
        with self.mixed(adapter_names):
            given = self.to_backbone(prompt)
            virtual: Any = None if given else make()
            if prompt.gives_cache:
                mask = "decoder_attention_mask" if joins.decoder else "attention_mask"
                inputs[mask] = pad_mask(inputs.get(mask), tokens)
                inputs.update(input_ids=input_ids, inputs_embeds=inputs_embeds, past_key_values=virtual)
            else:
                inputs["inputs_embeds"] = in_front(virtual[:, :tokens], self.embedded(input_ids, inputs_embeds))
                inputs["attention_mask"] = pad_mask(attention_mask, tokens)
                if (types := inputs.get("token_type_ids")) is not None:
                    inputs["token_type_ids"] = torch.cat([types.new_zeros(count, tokens), types], dim=1)
                if joins.decoder and prompt.before_decoder and config.num_transformer_submodules == 2:
                    self.join_decoder(inputs, virtual[:, tokens:])
            inputs = {key: value for key, value in inputs.items() if value is not None}
            context = self.peft_model.prompt_context
            with context.telling(make_cache=make) if given else nullcontext():
                unlabelled = tokens if joins.labels and not (joins.decoder or prompt.gives_cache) else 0
                return context.keep_for_backward(prompt.run(self.model, inputs, unlabelled))

    def to_backbone(self, kind: Any) -> bool:
        """Whether a prompt's cache goes to the backbone, as the model itself takes none: see `GivesCache`."""
        return kind.gives_cache and self.peft_model._joins.head and not takes(self.model, "past_key_values")

    def join_decoder(self, inputs: dict[str, Any], virtual: Tensor) -> None:
        """The second half of the prompt, in front of the decoder's input."""
        ids, embeds = inputs.pop("decoder_input_ids", None), inputs.get("decoder_inputs_embeds")
        labels = inputs["labels"]
        if ids is None and embeds is None:
            if labels is None:
                raise BatchError("Give `labels`, `decoder_input_ids` or `decoder_inputs_embeds`.")
            config = self.model.config
            ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        tokens = virtual.shape[1]
        inputs["decoder_inputs_embeds"] = in_front(virtual, self.embedded(ids, embeds))
        inputs["decoder_attention_mask"] = pad_mask(inputs.get("decoder_attention_mask"), tokens)
        if labels is not None:
            inputs["labels"] = pad_labels(labels, tokens)

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None:
            return inputs_embeds
        if "word_embeddings" not in self.peft_model._modules:
            raise BatchError("The model has no word embedding that was found; give `inputs_embeds`.")
        return self.peft_model.word_embeddings(input_ids)

    # ------------------------------------------------------------------------------------------------------- generating
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate` when prompts are off; the task classes generate with a prompt."""
        if self.peft_model.has_active_enabled_adapter:
            raise UnsupportedFeatureError("To generate with a prompt, set task_type to 'CAUSAL_LM' or 'SEQ_2_SEQ_LM'.")
        return self.model.generate(*args, **self._for_model(kwargs))

    def prepare_encoder(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate`, for an encoder with embeddings of the active prompt before the input."""
        if not self.peft_model._joins.decoder:
            return kwargs
        prompt, tokens = self.active, self.peft_model.active_peft_config.num_virtual_tokens
        kwargs = dict(kwargs)
        ids: Any = kwargs.get("input_ids")
        embeds: Any = kwargs.get("inputs_embeds")
        if ids is None and embeds is None:
            raise BatchError("`generate` with a prompt needs `input_ids` or `inputs_embeds`.")
        _positions(kwargs, prompt, tokens, token_types=False)
        if prompt.gives_cache:
            return kwargs
        if kwargs.pop("encoder_outputs", None) is not None:
            warnings.warn("`encoder_outputs` are ignored: the encoder has to read the prompt.", PeftWarning)
        virtual = self.get_prompt(len(embeds if ids is None else ids), kwargs.pop("task_ids", None))
        kwargs.pop("input_ids", None)
        kwargs["inputs_embeds"] = in_front(virtual[:, :tokens], self.embedded(ids, embeds))
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = pad_mask(kwargs["attention_mask"], tokens)
        return kwargs

    def prepare_token(
        self, inputs: dict[str, Any], mask: Tensor | None = None, task_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """Join the active prompt to what `prepare_inputs_for_generation` gave for one step.

        `mask` is the attention mask (batch, all tokens so far) without the prompt. The prompt itself goes in as long as
        the cache is empty; behind an encoder only a cache does, into that of the decoder.
        """
        prompt, tokens = self.active, self.peft_model.active_peft_config.num_virtual_tokens
        past = cached_tokens(inputs.get("past_key_values"))
        if self.peft_model._joins.decoder:
            if prompt.gives_cache and not past:
                inputs["past_key_values"] = self.get_prompt(len(inputs["decoder_input_ids"]))
            return inputs
        ids: Any = inputs.get("input_ids")
        embeds: Any = inputs.get("inputs_embeds")
        if past and ids is not None and past >= ids.shape[1]:
            inputs["input_ids"] = ids = ids[:, -1:]
        made = inputs.pop("attention_mask", None)  # for caches of fixed size a model makes its own, without the prompt
        mask = made if mask is None and isinstance(made, Tensor) and made.dim() == 2 else mask
        if mask is not None:
            inputs["attention_mask"] = pad_mask(mask, tokens)
            _warn_of_window(self.model, mask, tokens, first=past == 0)
        inputs.pop("token_type_ids", None)
        positions = inputs.get("position_ids")
        if positions is not None:
            positions = positions + tokens
            inputs["position_ids"] = positions if ids is None else positions[..., -ids.shape[1] :]
        steps = inputs.pop("cache_position", None)  # of transformers before 5; a model finds it itself
        if steps is not None and prompt.gives_cache:
            inputs["cache_position"] = steps if past else steps + tokens
        if past == 0:
            count = len(embeds if ids is None else ids)
            virtual = self.get_prompt(count, task_ids)
            if prompt.gives_cache:
                inputs["past_key_values"] = virtual
            else:
                inputs["inputs_embeds"] = in_front(virtual[:, :tokens], self.embedded(ids, embeds))
                inputs["input_ids"] = None
                if positions is not None:  # those of the input leave out its padding, before which the prompt stands
                    first = torch.arange(tokens, device=positions.device).expand(*positions.shape[:-1], tokens)
                    inputs["position_ids"] = torch.cat([first, inputs["position_ids"]], dim=-1)
                if getattr(inputs.get("past_key_values"), "is_compileable", False):  # of fixed size: no room for more
                    from transformers import DynamicCache

                    inputs["past_key_values"] = DynamicCache(config=self.model.config.get_text_config())
        return inputs


# ------------------------------------------------------------------------------------------------------------- sizes
def completed(config: Any, base: nn.Module, words: Any, cls: type[Prompt], decoder: bool = False) -> Any:
    """A copy of `config` with every size filled in. Raises `ConfigError` for what neither it nor the model says."""
    if not isinstance(config, PromptLearningConfig):
        raise ConfigError(f"{type(config).__name__} is no configuration of a prompt.")
    config = copy.copy(config)
    if config.num_virtual_tokens is None:
        raise ConfigError("Please specify `num_virtual_tokens` in `peft_config`.")
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if decoder or config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    own = getattr(base, "config", None)
    known = model_config(base)
    known = known.get("text_config", known)
    if not isinstance(known, dict):
        known = vars(known)

    def fill(field: str, *names: str, needed: bool = True) -> None:
        if getattr(config, field) is None:
            found = [getattr(own, names[0], None), *(known.get(name) for name in names)]
            setattr(config, field, next((value for value in found if value is not None), None))
        if getattr(config, field) is None and needed:
            raise ConfigError(
                f"Please specify `{field}` in `peft_config`: the model's config has none of {', '.join(names)}."
            )

    width = None if cls.gives_cache else getattr(words, "embedding_dim", None)
    if width is not None and config.token_dim not in (None, width):
        raise ConfigError(f"`token_dim` is {config.token_dim}, but the model's word embedding has {width} dimensions.")
    config.token_dim = config.token_dim or width
    fill("num_layers", "num_hidden_layers", "num_layers", "n_layer", needed=cls.gives_cache)
    fill("token_dim", "hidden_size", "n_embd", "d_model")
    fill(
        "num_attention_heads", "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads",
        needed=cls.gives_cache,
    )  # fmt: skip
    given = ("num_virtual_tokens", "num_transformer_submodules", "num_layers", "token_dim", "num_attention_heads")
    config.require_positive(*(field for field in given if getattr(config, field) is not None))
    if config.num_transformer_submodules > 2:
        raise ConfigError(f"`num_transformer_submodules` must be 1 or 2, got {config.num_transformer_submodules}.")
    if cls.gives_cache:
        _cached_heads(config, known)
        if config.token_dim % config.num_attention_heads:
            raise ConfigError(
                f"`token_dim` ({config.token_dim}) must be a multiple of `num_attention_heads` "
                f"({config.num_attention_heads}): keys and values are split into heads."
            )
    if getattr(config, "encoder_hidden_size", 0) is None:
        config.encoder_hidden_size = config.token_dim
    return config


def _cached_heads(config: Any, known: dict[str, Any]) -> None:
    """With grouped-query attention a cache has fewer heads than the queries; the widest layer decides."""
    heads = known.get("num_key_value_heads")
    if heads is None:
        return
    dim = known.get("head_dim") or config.token_dim // config.num_attention_heads
    for layer in (known.get("per_layer_config") or {}).values():
        if layer.get("head_dim", dim) > dim:
            dim, heads = layer["head_dim"], layer.get("num_key_value_heads", heads)
    config.token_dim, config.num_attention_heads = dim * heads, heads


def _backbone(base: nn.Module) -> str | None:
    """Name of the child that does the main work: transformers' model, or one that takes `past_key_values`."""
    children = dict(base.named_children())
    found = [name for name, child in children.items() if of_transformers(child)]
    return next(iter(found or [name for name, child in children.items() if takes(child, "past_key_values")]), None)


def word_embeddings(base: nn.Module, backbone: str | None = None) -> nn.Module | None:
    """The module that embeds `input_ids`, or None when there is none to be found."""
    try:
        return base.get_submodule("embeddings.word_embeddings")
    except AttributeError:
        pass
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = config.get("vocab_size") if isinstance(config, dict) else getattr(config, "vocab_size", None)
    inside = getattr(base, backbone) if backbone else base
    if size is not None:
        for module in inside.modules():
            weight = module._parameters.get("weight")
            if weight is not None and size in (weight.shape[0], getattr(weight, "ds_shape", (None,))[0]):
                return module
    if (words := embedding(base)) is not None:
        return words
    return next((module for module in base.modules() if isinstance(module, nn.Embedding)), None)


def _check_sizes(cls: type[Prompt], given: tuple, weights: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` if a loaded prompt would have a tensor that is larger than all of `weights`."""
    with torch.device("meta"):
        largest = max(parameter.numel() for parameter in cls(*given).parameters())
    if largest > (most := sum(tensor.numel() for tensor in weights.values())):
        raise CheckpointError(f"The configuration asks for {largest} numbers, but the file holds only {most}.")


def _dtype(base: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in base.parameters() if tensor.is_floating_point()), torch.get_default_dtype())


def takes(module: nn.Module, name: str, further: bool = False) -> bool:
    """Whether a module's forward has an argument of that name, or with `further` takes any that it does not name."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or (further and any(p.kind is p.VAR_KEYWORD for p in parameters.values()))


def _takes_cache(base: nn.Module, backbone: str | None) -> bool:
    inner = base if backbone is None else base.get_submodule(backbone)
    return takes(base, "past_key_values", further=backbone is None) or takes(inner, "past_key_values")


# ------------------------------------------------------------------------------------------------------- checkpoints
def _rows(prompt: Prompt, tokens: Tensor, config: Any) -> Tensor:
    """The numbers of all tokens of a prompt, (1, tokens)."""
    tokens = tokens[: config.num_virtual_tokens] if prompt.gives_cache else tokens
    return tokens[None].to(device_of(prompt))


def _load(
    base: nn.Module,
    prompt: Prompt,
    rows: Tensor,
    name: str,
    copies: list[tuple[str, nn.Module]],
    tensors: Mapping[str, Tensor],
    strict: bool,
    ignore: bool,
) -> Any:
    with torch.no_grad():
        held = prompt.saved(rows)
    entries = [state.Entry(key, f"prompt_encoder.{name}", held, key) for key in held]
    beside = list(checkpoint.entries_of_copies(copies, base, name, PREFIX))
    tensors = state.fitted(entries + beside, tensors)
    frozen, again = checkpoint.base_entries(base, tensors, entries + beside, PREFIX)
    beside += frozen
    report = state.check(entries + beside, tensors, again, strict, ignore=ignore)
    given = {state.strip(key): tensor for key, tensor in tensors.items()}
    fitting = {key: given[key] for key in held.keys() - set(report.missing_keys)}
    if fitting:
        prompt.load({**held, **fitting})
    state.fill(beside, tensors)
    return report


# ----------------------------------------------------------------------------------------------------------- prompts
def as_cache(base: nn.Module, virtual: Tensor, config: Any) -> Any:
    """Keys and values in the form that a model takes, from virtual tokens (batch, tokens, 2 * layers * dim)."""
    layers, heads, step = config.num_layers, config.num_attention_heads, 2 * config.num_transformer_submodules
    split = virtual.unflatten(2, (2 * layers, heads, -1))  # (batch, tokens, 2 * layers, heads, head dim)
    split = split.permute(2, 0, 3, 1, 4)
    # PEFT counts keys and values of cross-attention too, then leaves them out: with two submodules only every other
    # pair is used, each by two layers.
    pairs = [(split[step * i % (2 * layers)], split[(step * i + 1) % (2 * layers)]) for i in range(layers)]
    own: Any = getattr(base, "config", None)
    reshape = TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.get(getattr(own, "model_type", ""))
    if reshape is not None:
        return reshape([torch.stack(pair) for pair in pairs])
    if not of_transformers(base):
        return tuple(pairs)
    from transformers import DynamicCache, EncoderDecoderCache

    if step == 4 or getattr(own, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(pairs), DynamicCache())
    text = own.get_text_config()
    uneven = text.to_dict().get("per_layer_config") or getattr(text, "num_kv_shared_layers", 0)
    if not uneven:
        return DynamicCache(pairs)
    return _uneven_cache(DynamicCache(config=text), pairs, text)


def _uneven_cache(cache: Any, pairs: list[tuple[Tensor, Tensor]], text: Any) -> Any:
    """For models whose layers differ in heads or share keys and values: each layer gets what fits, or nothing."""
    per_layer = text.per_layer_config if text.to_dict().get("per_layer_config") else None
    first_shared = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    skipped = []
    for i, (keys, values) in enumerate(pairs):
        heads, dim = keys.shape[1], keys.shape[3]
        if per_layer is not None:
            heads, dim = per_layer[i].num_key_value_heads, per_layer[i].head_dim
        if i >= first_shared or heads > keys.shape[1] or dim > keys.shape[3]:
            skipped.append(i)
        else:
            cache.update(keys[:, :heads, :, :dim], values[:, :heads, :, :dim], i)
    if len(skipped) == len(pairs):
        raise ConfigError("The prefix fits no layer's keys and values; set `token_dim` and `num_attention_heads`.")
    if skipped:
        warnings.warn(f"The prefix skips layers {skipped}: they share their cache, or have a wider one.", PeftWarning)
    return cache


# ----------------------------------------------------------------------------------------------------------- joining
def _positions(inputs: dict[str, Any], prompt: Prompt, tokens: int, token_types: bool) -> None:
    """Positions count from the prompt on where the model takes them; token types stay where it may read them."""
    if inputs.get("position_ids") is not None:
        if prompt.gives_cache:
            inputs["position_ids"] = inputs["position_ids"] + tokens
        else:
            del inputs["position_ids"]
            warnings.warn("Position ids are not supported for this prompt. Ignoring position ids.", PeftWarning)
    if not token_types and inputs.get("token_type_ids") is not None:
        del inputs["token_type_ids"]
        warnings.warn("Token type ids are not supported for this task. Ignoring token type ids.", PeftWarning)


def pad_mask(mask: Tensor | None, tokens: int) -> Tensor | None:
    """An attention mask (batch, tokens + length) that shows the prompt too."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise BatchError(f"With a prompt, `attention_mask` must be of shape (batch, length), got {tuple(mask.shape)}.")
    return torch.cat([mask.new_ones(len(mask), tokens), mask], dim=1)


def pad_labels(labels: Tensor, tokens: int) -> Tensor:
    """Labels (batch, tokens + length), of which those of the prompt do not count."""
    return torch.cat([labels.new_full((len(labels), tokens), IGNORED), labels], dim=1)


def in_front(virtual: Tensor, embeds: Tensor) -> Tensor:
    """Embeddings (batch, tokens + length, dim) of the prompt and the input."""
    return torch.cat([virtual.to(embeds), embeds], dim=1)


# -------------------------------------------------------------------------------------------------------- generating
def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """A decoder's input (batch, length) for the labels `input_ids`: one place later, -100 as padding.

    Raises `BatchError` when there is no `pad_token_id` or no `decoder_start_token_id`.
    """
    if pad_token_id is None or decoder_start_token_id is None:
        raise BatchError("The model's config must define pad_token_id and decoder_start_token_id.")
    shifted = torch.cat([input_ids.new_full((len(input_ids), 1), decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds, of either form; 0 when there is none."""
    if cache is None:
        return 0
    return cache[0][0].shape[-2] if isinstance(cache, (tuple, list)) else int(cache.get_seq_length())


def _warn_of_window(base: Any, mask: Tensor, tokens: int, first: bool) -> None:
    """Say once that padding, which stands between prompt and input, takes room in a sliding window of attention."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    window, length = getattr(text, "sliding_window", None), tokens + mask.shape[1]
    if window and length > window and (first or length == window + 1) and not mask.bool().all():
        warnings.warn(
            f"With padding, {length} tokens do not fit the model's sliding window of {window}: a padded row sees less "
            "of its prompt than it would alone.",
            PeftWarning,
        )
