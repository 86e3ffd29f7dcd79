"""Shadow - ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning.
Li et al., 2026, https://arxiv.org/abs/2604.19254.

    h_l = F_l(h + alpha W_up W_down (h - s)),   s_l = (1 - g) s + g t       h, s: those of block l - 1
    t = T_l(h_l), g = sigmoid(G_l(h_l))         T, G: two linear layers with a GELU between, u wide inside
    s_0 = P(shadow(x))                          shadow: a small decoder, P: its width to d, if they differ

    h, s: (batch, length, d), W_down: (r, d), W_up: (d, r), 0 at the start
    parameters      2 in (r + 2 update_hidden_size + 1) + 2 update_hidden_size, and shadow in all

It goes around the blocks F_l of a decoder, which must follow each other; all but the shadow is frozen. While training,
`auxiliary_loss_weight` times the loss of head(s_0) is added to the loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Routed
from ...core.bases import inference_mode_off
from ...core.batch import BASE
from ...core.config import Count, PeftConfig, Positive, Probability, Size, TaskType
from ...core.errors import AdapterNameError, BatchError, ConfigError, UnsupportedFeatureError, UnsupportedLayerError
from ...core.offload import device_of, real_copy
from ...core.passes import NOTHING, Context, Pass
from ...core.targets import Targets, embedding
from ...core.walk import walk
from ...model.tuner import BaseTuner
from . import backbone as network

BESIDE = ("shadow_backbone", "shadow_projection", "shadow_head")  # what stands beside the model


@dataclass
class ShadowConfig(PeftConfig, method="SHADOW", layers_need_list=True):
    """Fields of Shadow."""

    target_modules: list[str] | str | None = None  # blocks, if None all
    exclude_modules: list[str] | str | None = None
    r: Size = 8
    shadow_alpha: float = 0.1
    shadow_dropout: Probability = 0.2  # on h - s
    init_weights: bool = True  # W_up = 0
    shadow_model: str = "mirror"  # a decoder like the model's own, or a folder or hub id of a trained one
    shadow_num_hidden_layers: Count | None = None  # of a mirror: 1 if None, and for the next three as in the model
    shadow_hidden_size: Size | None = None
    shadow_num_attention_heads: Positive | None = None
    shadow_intermediate_size: Size | None = None
    share_embeddings: bool = True  # a mirror of the same width reads the model's frozen embeddings
    update_hidden_size: Size | None = None  # u, if None r
    auxiliary_loss_weight: float = 0.05
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        sizes = [name for name in self.__dataclass_fields__ if re.fullmatch(r"shadow_num_.*|shadow_.*_size", name)]
        given = [name for name in sizes if getattr(self, name) is not None]
        if self.shadow_model != "mirror" and given:
            raise ConfigError(f"`shadow_model` names a trained model of its own sizes; unset {', '.join(given)}.")


class Trajectory(Context):
    """Passes that also tell the blocks `start`: s_0 (batch, length, d), or a function of the first block's input."""

    last: Pass = NOTHING  # the one that ended last


@dataclass
class Pair:
    """What one block hands on to the next: h and s."""

    hidden: Tensor
    shadow: Tensor


class Shadow(Routed, config=ShadowConfig):
    prefix = "shadow_"
    bases = ("Block",)
    shares = True

    @classmethod
    def prepare(cls, config: Any, model: Any) -> Any:
        config._width = network.width_of(model)
        names = {path: module for path, _, module in walk(model)}
        if config.target_modules is None:
            blocks = network.blocks_of(network.decoder_of(model))
            stem = next(path for path, module in names.items() if module is blocks)
            config.target_modules = {f"{stem}.{number}".lstrip(".") for number in range(len(blocks or ()))}
        wanted = Targets(config)
        wanted.indexes = set()
        chosen = [path for path in names if path in wanted]
        if config.layers_to_transform is not None:  # PEFT: not looked at, or nothing fits; full paths go both ways
            chosen = [path for path in chosen if _in_range(config, path)]
            if not chosen:
                raise ConfigError(f"`layers_to_transform` {config.layers_to_transform} is no block of the model.")
            config.target_modules = set(chosen)
        stems, numbers = {path.rpartition(".")[0] for path in chosen}, [path.rpartition(".")[2] for path in chosen]
        together = len(stems) == 1 and isinstance(names[min(stems)], nn.ModuleList)
        if chosen and not (together and [int(n) - int(numbers[0]) for n in numbers] == list(range(len(numbers)))):
            raise ConfigError(f"SHADOW needs blocks of one nn.ModuleList that follow each other, got {chosen}.")

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        super().check_beside(config, others)
        if others and any(c.task_type == TaskType.SEQ_CLS for c in (config, *others.values())):
            raise ConfigError("SHADOW allows one adapter only with task_type SEQ_CLS: its classifier is trained too.")

    @classmethod
    def extra_modules(cls, config: Any, model: Any) -> dict[str, nn.Module]:
        projection: Any = None
        if config.shadow_model == "mirror":
            backbone = network.mirror(model, config)
        elif network.of_diffusers(model):
            raise UnsupportedFeatureError("A diffusion transformer's shadow must be `shadow_model='mirror'`.")
        else:
            backbone, projection = network.load(config.shadow_model)
        inner, width = network.width_of(backbone), config._width
        if projection is None:
            projection = nn.Identity() if inner == width else nn.Linear(inner, width, bias=False)
        elif (projection.in_features, projection.out_features) != (inner, width):
            sizes = f"{projection.in_features} to {projection.out_features}"
            raise ConfigError(f"The projection of {config.shadow_model!r} is from {sizes}, not {inner} to {width}.")
        if network.shares_embeddings(model, backbone, config) and "embed_tokens" in backbone._modules:
            del backbone.embed_tokens
        made = {"shadow_backbone": backbone, "shadow_projection": projection}
        head = next((m for n in ("score", "classifier") if (m := getattr(model, n, None)) is not None), None)
        if config.task_type == TaskType.SEQ_CLS and head is not None:
            made["shadow_head"] = real_copy(head)
        like = next(model.parameters(), torch.empty(0))
        dtype = like.dtype if like.dtype.is_floating_point else None
        return {slot: module.to(device_of(model), dtype) for slot, module in made.items()}

    @classmethod
    def after_build(cls, config: Any, adapters: Any) -> None:
        for adapter in adapters:
            adapter.shadow_last = adapter is adapters[-1]

    @classmethod
    def saved_key(cls, slot: str, rest: str) -> str:
        return super().saved_key(f"{slot}.default", rest)  # PEFT: whatever the adapter's name is

    def build(self) -> None:
        c, d = self.config, self.config._width
        u = c.update_hidden_size or c.r
        self.shadow_r, self.shadow_alpha = c.r, c.shadow_alpha
        self.shadow_down = nn.Linear(d, c.r, bias=False)
        self.shadow_up = nn.Linear(c.r, d, bias=False)
        self.shadow_dropout = nn.Dropout(c.shadow_dropout) if c.shadow_dropout else nn.Identity()
        if c.init_weights:
            nn.init.zeros_(self.shadow_up.weight)
        self.shadow_update_transform = nn.Sequential(nn.Linear(d, u), nn.GELU(), nn.Linear(u, d))
        self.shadow_update_gate = nn.Sequential(nn.Linear(d, u), nn.GELU(), nn.Linear(u, d))

    def forward(self, x: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor):  # the first block
            start = getattr(self.layer.context.now, "start", None)
            if start is None:
                return inner(x, *args, **kwargs)
            x = Pair(x, start(x) if callable(start) else start)
            _check_lengths(x.hidden, x.shadow)
        output = inner(self.inject(x.hidden, x.shadow), *args, **kwargs)
        y = h = output if isinstance(output, Tensor) else output[0]
        if not self.shadow_last:
            y = Pair(h, self.advance(h, x.shadow))
        return y if isinstance(output, Tensor) else (y, *output[1:])

    def inject(self, h: Tensor, s: Tensor) -> Tensor:
        d = self.shadow_up(self.shadow_down(self.shadow_dropout((h - s).to(self.shadow_down.weight.dtype))))
        return h + (self.shadow_alpha * d).to(h.dtype)

    def advance(self, h: Tensor, s: Tensor) -> Tensor:
        h = h.to(self.shadow_down.weight.dtype)
        t, g = self.shadow_update_transform(h), self.shadow_update_gate(h).sigmoid()
        return ((1 - g) * s.to(h.dtype) + g * t).to(s.dtype)

    @staticmethod
    def forward_mixed(layer: Any, groups: dict[str, list[int]], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One pass of the block for all samples, the state of each kept in the pass."""
        now = layer.context.now
        here = {n: torch.tensor(rows, device=x.device) for n, rows in groups.items() if n in layer.adapters}
        for name, rows in here.items():
            _check_lengths(x, now.start)
            x = x.index_copy(0, rows, layer.adapters[name].inject(x[rows], now.start[rows]))
        output = layer.base_layer(x, *args, **kwargs)
        h = output if isinstance(output, Tensor) else output[0]
        for name, rows in here.items():
            s = now.start
            now.start = s.index_copy(0, rows, layer.adapters[name].advance(h[rows], s[rows]))
        return output


def _check_lengths(hidden: Tensor, shadow: Tensor) -> None:
    if hidden.shape[:-1] != shadow.shape[:-1]:
        shapes = f"{tuple(shadow.shape)} and {tuple(hidden.shape)}"
        raise BatchError(f"The shadow and the model see inputs of different lengths, {shapes}: pass on the cache.")


def _in_range(config: Any, path: str) -> bool:
    """Whether the block at `path` is one of `layers_to_transform`."""
    numbers, patterns = config.layers_to_transform, config.layers_pattern or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = next((m for p in patterns if (m := re.fullmatch(rf"(?:.*\.)?{p}\.(\d+)", path))), None)
    return found is not None and int(found[1]) in ({numbers} if isinstance(numbers, int) else numbers)


class ShadowModel(BaseTuner, method="SHADOW"):
    """A decoder with shadows. Attributes as in `BaseTuner`, and by adapter name `shadow_backbone`, `shadow_projection`
    and, for classifiers, `shadow_head`; `last_shadow_loss`, what the shadow itself lost in the last pass with labels.
    """

    context: Trajectory

    def _begin(self, model: Any) -> None:
        super()._begin(model)
        self.context = Trajectory()
        self.last_shadow_loss: Tensor | None = None
        self.hooks: list[Any] = []
        for slot in BESIDE:
            self.register(slot, nn.ModuleDict(), trained=True)

    @inference_mode_off()
    def add(self, name: str, config: Any, *args: Any, **kwargs: Any) -> Any:
        """See `BaseTuner.add`."""
        report = super().add(name, config, *args, **kwargs)
        self._train_beside(name, name in self.active_adapters and not config.inference_mode)
        if not self.hooks:
            self.hooks.append(self.model.register_forward_pre_hook(self._begin_pass, with_kwargs=True))
            self.hooks.append(self.model.register_forward_hook(self._end_pass, always_call=True))
            self.on_unload.append(self._stop)
        return report

    def _stop(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    # ------------------------------------------------------------------------------------------------------- running
    def _begin_pass(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Compute s_0, and give the model its own part of the cache."""
        now: Any = self.context.open(start=None, pasts={})  # pasts: the shadows' caches, until the model's own is there
        pasts: dict[str, Any] = {}
        cache: Any = kwargs.get("past_key_values")
        if isinstance(cache, network.ShadowCache):
            kwargs, cache, pasts = {**kwargs, "past_key_values": cache.base}, cache.base, cache.shadows
        mixed = now.adapter_names
        names = [name for name in dict.fromkeys(mixed or self.active_adapters) if name != BASE]
        if self._disabled or not names:
            return args, kwargs
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if ids is None and embeds is None:
            embeds = kwargs.get(getattr(self.model, "main_input_name", ""))
        if ids is None and embeds is None:  # a diffusion transformer
            if mixed is not None:
                raise BatchError("Mixed batches are not possible on a diffusion transformer with a shadow.")
            now.start = lambda hidden: self._start(names[0], None, hidden).last_hidden_state
            return args, kwargs
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = bool(getattr(getattr(self.model, "config", None), "use_cache", False))
        if hasattr(cache, "get_seq_length") and cache.get_seq_length() and (lacking := set(names) - set(pasts)):
            raise BatchError(f"The cache lacks what the shadow of {sorted(lacking)} has seen: pass on one of its own.")
        given = {name: kwargs[name] for name in ("position_ids",) if kwargs.get(name) is not None}
        given |= {"attention_mask": kwargs.get("attention_mask"), "use_cache": use_cache}
        starts = {}
        for name in names:  # each sees the whole batch, so that all caches have its rows
            output = self._start(name, ids, embeds, past_key_values=pasts.get(name), **given)
            starts[name] = output.last_hidden_state
            if use_cache and (past := getattr(output, "past_key_values", None)) is not None:
                now.pasts[name] = past
        start = starts[names[0]]
        for name, rows in (now.groups(len(start), None) or {}).items():
            if name in starts:
                index = torch.tensor(rows, device=start.device)
                start = start.index_copy(0, index, starts[name][index])
        now.start = start
        return args, kwargs

    def _start(self, name: str, ids: Any, embeds: Any, **given: Any) -> Any:
        """The shadow's output, with s_0 in the place of its own hidden states."""
        backbone = self.shadow_backbone[name]
        if embeds is None and network.shares_embeddings(self.model, backbone, self.peft_config[name]):
            embeds = self.model.get_input_embeddings()(ids)
        inputs = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        output = backbone(**inputs, **given, return_dict=True)
        if not hasattr(output, "last_hidden_state"):
            raise UnsupportedLayerError(f"{type(backbone).__name__} cannot be a shadow: it has no `last_hidden_state`.")
        output.last_hidden_state = self.shadow_projection[name](output.last_hidden_state)
        return output

    def _end_pass(self, module: nn.Module, args: tuple, output: Any) -> Any:
        now: Any = self.context.now
        pasts, now.pasts = now.pasts, {}
        if pasts and hasattr(output, "past_key_values"):
            output.past_key_values = network.ShadowCache(output.past_key_values, pasts)
        self.context.keep_for_backward(output)
        self.context.close()
        self.context.last = now
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. With `labels`, the output's loss has the shadow's own added, times its weight."""
        output = super().forward(*args, **kwargs)
        self.last_shadow_loss = None
        labels, start = kwargs.get("labels"), getattr(self.context.last, "start", None)
        if labels is None or getattr(output, "loss", None) is None or not isinstance(start, Tensor):
            return output
        if self.context.last.adapter_names is not None:  # there is no one shadow
            return output
        loss = self.shadow_auxiliary_loss(labels, kwargs.get("attention_mask"))
        if loss is not None:
            self.last_shadow_loss = output.shadow_loss = loss.detach()
            config: Any = self.peft_config[self.active_adapters[0]]
            if config.auxiliary_loss_weight > 0:
                output.loss = output.loss + config.auxiliary_loss_weight * loss
        return output

    def shadow_auxiliary_loss(self, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """The loss of head(s_0) in the last pass, not yet weighted; None when there was no shadow, or has no head."""
        name, start = self.active_adapters[0], getattr(self.context.last, "start", None)
        head = self._head(name)
        if head is None or not isinstance(start, Tensor):
            return None
        if name in self.shadow_head:
            return network.classification_loss(head(network.last_token(start, attention_mask)), labels)
        return network.next_token_loss(head(start), labels)

    def _head(self, name: str) -> Any:
        if name in self.shadow_head:
            return self.shadow_head[name]
        of_words = self.peft_config[name].task_type == TaskType.CAUSAL_LM
        return self.model.get_output_embeddings() if of_words else None

    # ------------------------------------------------------------------------------------------------- which adapter
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, and trainable unless `inference_mode`."""
        super().set_adapter(adapter_name, inference_mode)
        for name in self.peft_config:
            self._train_beside(name, name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, without activating them."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._train_beside(name, requires_grad)

    def _train_beside(self, name: str, on: bool) -> None:
        for slot in BESIDE:
            if name in (box := getattr(self, slot)):
                box[name].requires_grad_(on)
        config: Any = self.peft_config[name]
        if config.shadow_model != "mirror":  # a trained vocabulary stays as it is
            backbone = self.shadow_backbone[name]
            for words in (embedding(backbone), embedding(backbone, output=True)):
                if words is not None:
                    words.requires_grad_(False)

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> nn.Module:
        """The shadow on its own, without the base model: head(P(shadow(x))), for a decoder also with `generate`.

        `copy`: with tensors of its own, and the base model's embeddings among them if it reads those; it can be saved
        then. Raises `AdapterNameError` for an unknown adapter and `UnsupportedFeatureError` for diffusion transformers.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        if name not in self.peft_config:
            raise AdapterNameError(f"No shadow backbone found for adapter '{name}', only {sorted(self.peft_config)}.")
        if network.of_diffusers(self.model):
            raise UnsupportedFeatureError("A diffusion transformer's shadow cannot work without it.")
        parts: list[Any] = [self.shadow_backbone[name], self.shadow_projection[name], self._head(name)]
        words = None
        if network.shares_embeddings(self.model, parts[0], self.peft_config[name]):
            words = self.model.get_input_embeddings()
        if copy:
            *parts, words = deepcopy([*parts, words])
        free = network.detached(*parts, self.peft_config[name].task_type == TaskType.SEQ_CLS, words)
        if copy and words is not None:
            free.own_embeddings()
        return free
