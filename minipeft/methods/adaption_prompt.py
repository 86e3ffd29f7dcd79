"""Adaption prompt - LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention.
Zhang et al., 2023, https://arxiv.org/abs/2303.16199, section 3.2.

    y = Attention(x) + g * softmax(Q K_P^T / sqrt(d)) V_P W_O        K_P = P W_K, V_P = P W_V

    P: (1, tokens, hidden), g: (1,), 0 at the start
    Q: (batch, heads, length, d), K_P and V_P: (1, heads, tokens, d), all by the frozen attention module's own weights
    parameters      adapter_layers (adapter_len in + 1) in all

It goes around whole attention modules, those of the last layers. Such a module is one of two kinds, known by its names:

- as in Llama and Mistral: linear layers `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `head_dim`; queries turn if the
  module is called with `position_embeddings`, which are (cos, sin), each (batch, length, d)
- as in GPT-2: one layer `c_attn` for queries, keys and values, each `split_size` wide, `c_proj`, and `head_dim`

It is called with `hidden_states` (batch, length, hidden), and returns y or a tuple that begins with y.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.bases import inference_mode_off
from ..core.config import IN_FILE, PeftConfig
from ..core.errors import (
    AdapterNameError,
    ConfigError,
    MergeError,
    UnsupportedFeatureError,
    UnsupportedLayerError,
    sized,
)
from ..core.offload import device_of
from ..core.passes import Context
from ..core.plan import check_adapter_name, model_config
from ..core.state import PREFIX, Entry, check, fill, fitted, incoming
from ..core.targets import named
from ..core.walk import Wrapper, put_at, walk
from ..model.tuner import BaseTuner

TARGETS = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}  # by model type


@dataclass
class AdaptionPromptConfig(PeftConfig, method="ADAPTION_PROMPT"):
    """Fields of adaption prompts; `adapter_len` and `adapter_layers` must be given."""

    target_modules: str | None = None  # name of the attention modules, if None that of the model type
    adapter_len: Annotated[int, IN_FILE] | None = None  # tokens
    adapter_layers: int | None = None  # how many layers, counted from the last

    is_adaption_prompt: ClassVar[bool] = True


class AdaptedAttention(Wrapper):
    """The attention module `model` with the prompt of one adapter."""

    wraps = "model"

    def __init__(self, model: Any, path: str, tokens: int, context: Context, device: Any):
        super().__init__()
        self.context = context
        self.fused = {"c_attn", "c_proj"} <= model._modules.keys() and "q_attn" not in model._modules
        children = {name for name, child in model.named_children() if next(child.parameters(), None) is not None}
        if not self.fused and children != {"q_proj", "k_proj", "v_proj", "o_proj"}:
            raise UnsupportedLayerError(
                f"ADAPTION_PROMPT cannot adapt '{path}', a {type(model).__name__}: it needs self-attention with "
                "weights in q_proj, k_proj, v_proj and o_proj and nowhere else, or in c_attn and c_proj."
            )
        weight = (model.c_proj if self.fused else model.q_proj).weight
        new: dict[str, Any] = {
            "device": device or device_of(model),
            "dtype": torch.float32 if weight.dtype in (torch.int8, torch.uint8) else weight.dtype,
        }
        width = model.split_size if self.fused else model.k_proj.in_features
        self.model = model
        self.adaption_prompt = nn.Parameter(torch.empty(1, tokens, width, **new).normal_())
        self.adaption_gate = nn.Parameter(torch.zeros(1, **new))
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if self.context.now.adapter_names is not None:  # the model has added to it what each sample's adapter adds
            return output
        return _added(output, lambda y: y + self.attend(*_inputs(args, kwargs)))

    def attend(self, x: Tensor, rotation: Any = None) -> Tensor:
        """What attending to the prompt adds to the output, for the input x (batch, length, hidden)."""
        a, P = self.model, self.adaption_prompt
        if self.fused:
            q = a.c_attn(x)[..., : a.split_size]
            _, k, v = a.c_attn(P).split(a.split_size, dim=-1)
        else:
            q, k, v = a.q_proj(x), a.k_proj(P), a.v_proj(P)
        q, k, v = (t.to(q.dtype).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for t in (q, k, v))
        if rotation is not None:
            cos, sin = (t.unsqueeze(1) for t in rotation)
            left, right = q.chunk(2, dim=-1)
            q = q * cos + torch.cat((-right, left), dim=-1) * sin  # (batch, heads, length, d)
        groups = q.shape[1] // k.shape[1]  # queries that share keys and values
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (1, heads, tokens, d)
        scores = q @ k.mT / math.sqrt(a.head_dim)
        shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
        y = ((self.adaption_gate * shares) @ v).transpose(1, 2).flatten(2)  # PEFT: no tanh; one gate for all heads
        return y if self.fused else a.o_proj(y)  # PEFT: without GPT-2's c_proj


def _inputs(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """What `attend` takes, out of the arguments of an attention module."""
    return args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings")


def _added(output: Any, add: Any) -> Any:
    """An attention module's output, its first tensor y replaced by add(y)."""
    if isinstance(output, Tensor):
        return add(output).to(output.dtype)
    return (add(output[0]).to(output[0].dtype), *output[1:])


class AddsMixed:
    """A hook behind an attention module: in a mixed batch it adds what each sample's adapter does, if that is here.

    It stays there: torch does not let other threads run while one takes a hook away. In other passes it does nothing.
    """

    def __init__(self, context: Any, path: str):
        self.context, self.path = context, path

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        now = self.context.now
        if now.adapter_names is None:
            return output
        x, rotation = _inputs(args, kwargs)

        def add(y: Tensor) -> Tensor:
            for name, rows in now.groups(len(x), None).items():
                if (prompt := now.prompts.get(name, {}).get(self.path)) is not None:
                    index = torch.tensor(rows, device=x.device)
                    turn = rotation and tuple(t if len(t) == 1 else t[index] for t in rotation)
                    y = y.index_add(0, index, prompt.attend(x[index], turn).to(y.dtype))
            return y

        return _added(output, add)


class AdaptionPromptModel(BaseTuner, method="ADAPTION_PROMPT"):
    """A model with adaption prompts. Attributes as in `BaseTuner`.

    Only the active adapter's modules stand in the model, and only its tensors are in the state dict, their names
    without the adapter's: `self_attn.adaption_prompt`. All are in `prompts`, by adapter and path.
    """

    def _begin(self, model: Any) -> None:
        super()._begin(model)
        self.prompts: dict[str, dict[str, AdaptedAttention]] = {}
        self.hooks: dict[str, Any] = {}  # by path: what removes the hook there

    def add_adapter(self, adapter_name: str, config: PeftConfig) -> None:
        """Add an untrained adapter. It becomes active if it is the only one."""
        self.add(adapter_name, config)

    @inference_mode_off()
    @sized()
    def add(
        self,
        name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        strict: bool = True,
        keys: Any = None,
        ignore: bool = False,
    ) -> Any:
        """See `BaseTuner.add`."""
        if name in self.peft_config:
            raise AdapterNameError(f"Adapter with name '{name}' already exists.")
        check_adapter_name(name, self.model)
        target, paths = self._find(config)
        if weights is not None:
            weights = incoming(weights, config)
        device = "meta" if low_cpu_mem_usage and weights is None else None
        new = (config.adapter_len, self.context, device)
        prompts = {path: AdaptedAttention(self._attention(path), path, *new) for path in paths}
        report = None if weights is None else _load(prompts, weights, strict, ignore)
        config.target_modules = target
        self.prompts[name], self.peft_config[name] = prompts, config
        self.targeted_module_names[:] = dict.fromkeys([*self.targeted_module_names, *prompts])
        self.set_requires_grad(name, not config.inference_mode)
        for path in prompts.keys() - self.hooks.keys():
            add = AddsMixed(self.context, path)
            self.hooks[path] = self._attention(path).register_forward_hook(add, with_kwargs=True)
        if len(self.peft_config) == 1:
            self._freeze_base(module for _, _, module in walk(self.model))
            self.active_adapter = name
            self._show()
        return report

    def _find(self, config: Any) -> tuple[str, list[str]]:
        """The target's name and the paths of the modules to adapt. Raises `PeftError` for what does not fit."""
        for field in ("adapter_len", "adapter_layers"):
            if getattr(config, field) is None:
                raise ConfigError(f"Please specify `{field}` in AdaptionPromptConfig: a whole number above 0.")
        config.require_positive("adapter_len", "adapter_layers")
        kind = model_config(self.model).get("model_type", "custom")
        if kind not in (*TARGETS, "custom"):
            known = ", ".join(TARGETS)
            raise UnsupportedFeatureError(f"Unsupported model type for adaption prompt: '{kind}'. It knows {known}.")
        target = config.target_modules or TARGETS.get(kind)
        if target is None:
            raise ConfigError("Please specify `target_modules`, the name of the model's attention modules.")
        paths = list(dict.fromkeys(path for path, _, _ in walk(self.model) if path and named(path, {target})))
        if len(paths) < config.adapter_layers:
            raise ConfigError(
                f"Config specifies more adapter layers '{config.adapter_layers}' than the model has '{len(paths)}' "
                f"modules of the name '{target}'."
            )
        return target, paths[-config.adapter_layers :]

    def _live(self, path: str) -> str:
        """What stands at `path` is called so now: wrappers around modules may have come."""
        return next(live for known, live, _ in walk(self.model) if known == path)

    def _attention(self, path: str) -> nn.Module:
        module = self.model.get_submodule(self._live(path))
        return module.model if isinstance(module, AdaptedAttention) else module

    def _show(self) -> None:
        """Put the prompts that are on into the model, and take all others out of it."""
        for path in self.targeted_module_names:
            on = [] if self._disabled else [name for name in self.active_adapters if path in self.prompts[name]]
            put_at(self.model, self._live(path), self.prompts[on[0]][path] if on else self._attention(path))

    # ----------------------------------------------------------------------------------------------- which adapter
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, and trainable unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if unknown := [n for n in names if n not in self.peft_config]:
            raise AdapterNameError(f"Adapter with name '{unknown[0]}' does not exist, only {sorted(self.peft_config)}.")
        if len(names) > 1:
            raise AdapterNameError(f"ADAPTION_PROMPT allows one active adapter, got {names}.")
        self.set_requires_grad(names, not inference_mode)
        self.active_adapter = adapter_name
        self._show()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, without activating them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for entry in self.further_entries(name, ""):
                entry.tensor.requires_grad_(requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self._disabled = not enabled
        self._show()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. When it was active, the first that is left becomes active."""
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"Adapter {adapter_name} does not exist; this model has {sorted(self.peft_config)}.")
        del self.peft_config[adapter_name]
        if adapter_name in self.active_adapters:
            self.active_adapter = next(iter(self.peft_config), [])
        del self.prompts[adapter_name]
        self._show()

    @contextmanager
    def _tell(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        with super()._tell(args, kwargs):
            mixed = self.context.now.adapter_names is not None
            with self.context.telling(prompts=self.prompts) if mixed else nullcontext():
                yield

    # ------------------------------------------------------------------------------------------------------- tensors
    def further_entries(self, name: str, prefix: str) -> Iterator[Entry]:
        """The tensors of an adapter, whether it stands in the model or not."""
        return _entries(self.prompts[name], prefix)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        shown = {id(module) for module in self.model.modules()}
        for prompts in self.prompts.values():
            for attention in prompts.values():
                if id(attention) not in shown:
                    nn.Module._apply(attention, fn, recurse=False)
        return super()._apply(fn, recurse)

    def _merge(self, *args: Any, **kwargs: Any) -> None:
        raise MergeError("ADAPTION_PROMPT depends on its input and cannot be merged into weights.")

    def unload(self) -> nn.Module:
        """The base model without any prompt."""
        while self.hooks:
            self.hooks.popitem()[1].remove()
        self.active_adapter = []
        self._show()
        return self.model


def _entries(prompts: dict[str, AdaptedAttention], prefix: str) -> Iterator[Entry]:
    for path, attention in prompts.items():
        for key in attention._parameters:
            yield Entry(f"{prefix}{path}.{key}", f"{prefix}{path}.{key}", attention._parameters, key)


def _load(prompts: dict[str, AdaptedAttention], weights: Mapping[str, Tensor], strict: bool, ignore: bool) -> Any:
    entries = list(_entries(prompts, PREFIX))
    weights = fitted(entries, weights)
    report = check(entries, weights, strict=strict, ignore=ignore)
    fill(entries, weights)
    return report
