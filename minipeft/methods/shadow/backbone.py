"""The small network of a Shadow adapter: found and mirrored in the base model, loaded, cached, and set free from it."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import BatchError, CheckpointError, ConfigError, PeftError, UnsupportedFeatureError, shown
from ...core.plan import of_transformers
from ...model.prompt import takes

BLOCKS = ("layers", "h", "single_transformer_blocks", "transformer_blocks")  # names of a list of blocks
DEPTH, WIDTH = ("num_hidden_layers", "n_layer", "num_layers"), ("hidden_size", "n_embd", "d_model")
HEADS, INNER = ("num_attention_heads", "n_head", "num_heads"), ("intermediate_size", "ffn_dim", "n_inner")
PROJECTED = "causal_lm_with_hidden_projection"  # the model type of a checkpoint that brings its projection along


class Output(dict):
    """What a model returns that is not of transformers: names and values, the values as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


# ------------------------------------------------------------------------------------------------------- base models
def blocks_of(module: Any) -> nn.ModuleList | None:
    """The blocks of a decoder, if it has a list of them under one of the usual names."""
    found = (getattr(module, name, None) for name in BLOCKS)
    return next((blocks for blocks in found if isinstance(blocks, nn.ModuleList)), None)


def decoder_of(model: Any) -> Any:
    """The part of a model that holds its blocks. Raises `ConfigError` when there is none to be found."""
    heads = [] if of_diffusers(model) else [getattr(model, n, None) for n in ("model", "transformer", "base_model")]
    heads += [] if of_diffusers(model) else [getattr(model, "decoder", None)]
    inner = [part for head in heads if isinstance(head, nn.Module) for part in (getattr(head, "decoder", None), head)]
    for part in (*inner, model):
        if isinstance(part, nn.Module) and blocks_of(part) is not None:
            return part
    raise ConfigError(
        f"{type(model).__name__} has no list of blocks named {', '.join(BLOCKS)}, in itself or in its `model`, "
        "`transformer` or `decoder`. SHADOW adapts decoders."
    )


def of_diffusers(model: Any) -> bool:
    """Whether a model is a diffusion transformer, which reads hidden states, no tokens."""
    single, double, layers = (getattr(model, name, None) for name in (*BLOCKS[2:], BLOCKS[0]))
    lists = isinstance(double, nn.ModuleList) and not isinstance(layers, nn.ModuleList)
    return isinstance(single, nn.ModuleList) or lists


def width_of(model: Any) -> int:
    """The width of a model's hidden states, by its config."""
    config: Any = getattr(model, "config", None)
    for name in WIDTH:
        if hasattr(config, name):
            return int(getattr(config, name))
    if hasattr(config, "num_attention_heads") and hasattr(config, "attention_head_dim"):
        return int(config.num_attention_heads) * int(config.attention_head_dim)
    raise ConfigError(f"SHADOW needs `config.hidden_size` of the model, but {type(model).__name__} does not say it.")


# ---------------------------------------------------------------------------------------------------------- backbones
def mirror(model: Any, config: Any) -> nn.Module:
    """A new decoder of the model's class, with fewer or smaller layers."""
    if of_diffusers(model):
        if type(model).__name__ == "Flux2Transformer2DModel":
            raise UnsupportedFeatureError("SHADOW on Flux2, whose shadow PEFT cuts out of the model, is not supported.")
        width = width_of(model)
        depth, inner = config.shadow_num_hidden_layers or 1, config.shadow_intermediate_size
        return TokenBackbone(width, config.shadow_hidden_size or width, depth, inner)
    decoder = decoder_of(model)
    if not hasattr(decoder, "config"):
        raise ConfigError(f"{type(decoder).__name__} has no `config` to make a smaller one of its class from.")
    sizes = copy.deepcopy(decoder.config)
    _resize(sizes, DEPTH, config.shadow_num_hidden_layers or 1)
    _resize(sizes, WIDTH, config.shadow_hidden_size)
    _resize(sizes, INNER, config.shadow_intermediate_size)
    _resize(sizes, HEADS, config.shadow_num_attention_heads)
    depth = getattr(sizes, DEPTH[0], None)
    kinds = getattr(sizes, "layer_types", None)
    if depth is not None and kinds is not None:
        kinds = list(kinds) or ["full_attention"]
        sizes.layer_types = (kinds + kinds[-1:] * depth)[:depth]
    if depth is not None and getattr(sizes, "max_window_layers", None) is not None:
        sizes.max_window_layers = min(sizes.max_window_layers, depth)
    try:
        return type(decoder)(sizes)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"A smaller {type(decoder).__name__} cannot be made from its `config`: {error}") from error


def _resize(sizes: Any, names: tuple[str, ...], value: int | None) -> None:
    if value is None:
        return
    for name in names:
        if hasattr(sizes, name):
            return setattr(sizes, name, value)
    raise ConfigError(f"The model's config has none of {', '.join(names)}, so its shadow cannot have {value} there.")


class TokenBackbone(nn.Module):
    """For diffusion transformers: h = W x, then h = h + MLP(LayerNorm(h)) in each of `depth` blocks, token by token."""

    def __init__(self, inp: int, width: int, depth: int = 1, inner: int | None = None):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.proj_in = nn.Linear(inp, width)
        inner = inner or width
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            for _ in range(depth)
        )

    def forward(self, inputs_embeds: Tensor, **unused: Any) -> Output:
        h = self.proj_in(inputs_embeds)  # (batch, tokens, width)
        for block in self.blocks:
            h = h + block(h)
        return Output(last_hidden_state=h)


def load(source: str) -> tuple[nn.Module, nn.Linear | None]:
    """A pretrained backbone of transformers, from a folder or a hub id, and its projection if it brings one.

    Raises `CheckpointError` when there is none that can be read.
    """
    try:
        return _load(source)
    except PeftError:
        raise
    except Exception as error:
        raise CheckpointError(f"shadow_model={shown(source)} cannot be loaded: {error}") from error


def _load(source: str) -> tuple[nn.Module, nn.Linear | None]:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel
    from transformers.utils import cached_file

    sizes = json.loads(Path(str(cached_file(source, "config.json"))).read_text(encoding="utf-8"))
    if sizes.get("model_type") != PROJECTED:
        return AutoModel.from_pretrained(source), None
    inner = dict(sizes["shadow_model_config"])
    backbone = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
    weights = load_file(str(cached_file(source, "model.safetensors")))
    own = {key.removeprefix("shadow_model."): t for key, t in weights.items() if key.startswith("shadow_model.")}
    backbone.load_state_dict(own)
    if (W := weights.get("shadow_hidden_projection.weight")) is None:
        raise CheckpointError(f"'{source}' has no 'shadow_hidden_projection.weight', though its config says so.")
    projection = nn.Linear(W.shape[1], W.shape[0], bias=False)
    projection.weight.data.copy_(W)
    return backbone, projection


def shares_embeddings(model: Any, backbone: nn.Module, config: Any) -> bool:
    """Whether the backbone reads the base model's embeddings in the place of its own."""
    mirrored = config.share_embeddings and config.shadow_model == "mirror" and not of_diffusers(model)
    return mirrored and takes(backbone, "inputs_embeds") and width_of(backbone) == width_of(model)


# ------------------------------------------------------------------------------------------------------------ losses
def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (batch, length, vocabulary) with the labels (batch, length) one place on."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that transformers takes for logits (batch, labels): by their number, and the dtype of the labels."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1))
    if labels.dtype in (torch.long, torch.int):
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


def last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Of hidden states (batch, length, dim) those at each sample's last token that the mask shows."""
    if attention_mask is None:
        return hidden[:, -1]
    places = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), (attention_mask.ne(0) * places).argmax(-1)]


# ------------------------------------------------------------------------------------------------------------- cache
class ShadowCache:
    """The cache of a model and those of its shadows, by adapter. What is asked of it is answered by the model's own."""

    is_compileable = False

    def __init__(self, base: Any, shadows: dict[str, Any]):
        self.base, self.shadows = base, shadows

    @property
    def shadow(self) -> Any:
        """That of the one active adapter."""
        return next(iter(self.shadows.values()))

    def _all(self, method: str, *args: Any) -> None:
        for cache in (self.base, *self.shadows.values()):
            getattr(cache, method)(*args)

    def reset(self) -> None:
        """Empty all."""
        self._all("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows in the place of all, as beam search wants it."""
        self._all("reorder_cache", beam_idx)

    def crop(self, tokens: int) -> None:
        """Forget the last -`tokens` tokens (of older caches: all after the first `tokens`)."""
        self._all("crop", tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make several rows of each."""
        self._all("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._all("batch_select_indices", indices)

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "shadows") or name.startswith("__"):  # half built, by copy or pickle
            raise AttributeError(name)
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Any:
        return iter(self.base)

    def __getitem__(self, layer: int) -> Any:
        return self.base[layer]


# ---------------------------------------------------------------------------------------------------------- detached
class Detached:
    """What a shadow computes without its base model: head(projection(backbone(x)))."""

    backbone: Any
    shadow_hidden_projection: nn.Module
    head: nn.Module | None
    is_classification: bool
    outside: list[Any]  # the embedding that it reads in the place of the backbone's own

    def put(
        self, backbone: nn.Module, projection: nn.Module, head: nn.Module | None, classifies: bool, embeddings: Any
    ) -> None:
        self.backbone, self.shadow_hidden_projection, self.head = backbone, projection, head
        self.is_classification, self.outside = classifies, [embeddings]

    def get_input_embeddings(self) -> Any:
        """What embeds `input_ids`."""
        return self.outside[0] if self.outside[0] is not None else self.backbone.get_input_embeddings()

    def own_embeddings(self) -> None:
        """Make the embedding from outside a part of this model."""
        self.backbone.embed_tokens = self.outside[0]

    def get_output_embeddings(self) -> Any:
        """The head, if it predicts tokens."""
        return None if getattr(self, "is_classification", False) else self.head

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        """Logits, and the loss for `labels`; without a head the hidden states (batch, length, dim)."""
        for name in ("logits_to_keep", "num_logits_to_keep"):  # of generate, for models with a head of their own
            kwargs.pop(name, None)
        if self.outside[0] is not None and kwargs.get("inputs_embeds") is None:
            if input_ids is None:
                raise BatchError("Give `input_ids` or `inputs_embeds`.")
            kwargs["inputs_embeds"], input_ids = self.outside[0](input_ids), None
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **{**kwargs, "return_dict": True})
        hidden = self.shadow_hidden_projection(output.last_hidden_state)
        if self.head is None:
            return hidden
        logits = self.head(last_token(hidden, attention_mask) if self.is_classification else hidden)
        loss_of = classification_loss if self.is_classification else next_token_loss
        loss = None if labels is None else loss_of(logits, labels)
        past = {} if self.is_classification else {"past_key_values": getattr(output, "past_key_values", None)}
        return self.output(loss=loss, logits=logits, **past)

    def output(self, **values: Any) -> Any:
        return Output(values)


class DetachedModule(Detached, nn.Module):
    """A shadow on its own, for models that are not of transformers."""

    def __init__(self, *parts: Any):
        nn.Module.__init__(self)
        self.put(*parts)


def detached(backbone: nn.Module, *parts: Any) -> Any:
    """A model of its own: of transformers, with `generate`, if the backbone is."""
    return (_of_transformers() if of_transformers(backbone) else DetachedModule)(backbone, *parts)


@functools.cache
def _of_transformers() -> Any:
    from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, modeling_outputs

    class DetachedShadowModel(Detached, PreTrainedModel, GenerationMixin):
        """A shadow on its own, as a model of transformers."""

        base_model_prefix = "backbone"
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
        forward = Detached.forward

        def __init__(self, backbone: Any, *parts: Any):
            PreTrainedModel.__init__(self, backbone.config)
            self.put(backbone, *parts)
            made = getattr(backbone, "generation_config", None)
            self.generation_config = made or GenerationConfig.from_model_config(self.config)

        def can_generate(self) -> bool:  # type: ignore[override]
            return getattr(self, "head", None) is not None and not self.is_classification

        def set_input_embeddings(self, value: Any) -> None:
            if self.outside[0] is None:
                self.backbone.set_input_embeddings(value)
                return
            if self.backbone._modules.get("embed_tokens") is self.outside[0]:
                self.backbone.embed_tokens = value
            self.outside[0] = value

        def output(self, **values: Any) -> Any:
            kind = "SequenceClassifierOutput" if self.is_classification else "CausalLMOutputWithPast"
            return getattr(modeling_outputs, kind)(**values)

    DetachedShadowModel.__qualname__ = DetachedShadowModel.__name__
    globals()["DetachedShadowModel"] = DetachedShadowModel  # where pickle looks for it
    return DetachedShadowModel
