"""A model with adapters in it, and what can be done with them: the `base_model` of a PeftModel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..core import registry
from ..core.adapter import ADAPTERS, adapter_class
from ..core.bases import inference_mode_off
from ..core.config import CONFIGS, PeftConfig, PeftType
from ..core.errors import UnsupportedFeatureError
from ..core.layer import Context, layers
from ..core.offload import check_biases
from ..core.plan import model_config
from ..core.state import Entry
from ..core.tuner import Tuner
from . import tying
from .checkpoint import entries_of_biases
from .plan import ModelPlan
from .prompt import cached_tokens

TUNERS: dict[PeftType, type[BaseTuner]] = {}  # filled as the tuner classes are defined


class _SharedState:
    """Of a tuner's class: whether its method keeps tensors that all layers need beside the model."""

    def __get__(self, tuner: Any, cls: type[BaseTuner]) -> bool:
        kinds = ADAPTERS.get(cls.method, []) if cls.method is not None else []
        return any(kind.shares for kind in kinds)


class BaseTuner(Tuner):
    """A model with adapters of one method. Attributes: `model`, `peft_config` (by adapter name), `active_adapter`.

    Beside what `core` puts on layers: copies of whole modules, trained biases, tied weights, `generate`. Tensors that
    all layers share (VeRA's projections) are slots of this module: `base_model.vera_A.default`.
    """

    plan = ModelPlan
    never_models = frozenset({"adapter_names", "alora_offsets"})  # PEFT: whatever is on the model
    uses_shared_state = _SharedState()

    def __init_subclass__(cls, method: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if method is not None:
            cls.method = PeftType(method)
            TUNERS[cls.method] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ):
        super().__init__()
        self._begin(model)
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        self.add(adapter_name, configs[adapter_name], low_cpu_mem_usage=low_cpu_mem_usage, keys=state_dict)

    def _begin(self, model: Any) -> None:
        super()._begin(model)
        self.biases: dict[str, tuple[nn.Parameter, Tensor]] = {}  # saved key -> (parameter, the values not in use)
        self.bias_owner: str | None = None  # the adapter that trains the biases
        self.biases_on = True
        self.growth: Any = None  # the hook that says how far `generate` is, for adapters that need to know

    # -------------------------------------------------------------------------------------------------------- adding
    def _added(self, plan: Any) -> None:
        if plan.cls.per_sample is not None and self.growth is None:
            self.growth = self.model.register_forward_pre_hook(Growth(self.context), with_kwargs=True)
        self._own_biases(plan.name, plan.config)
        super()._added(plan)
        if plan.cls.changes_base(plan.config):
            tying.note_untied(self.model, f"by adapter {plan.name!r}")

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Build the adapter whose configuration stands at `peft_config[adapter_name]` already."""
        config = self.peft_config.pop(adapter_name)
        self.add(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage, keys=state_dict)

    def further_entries(self, name: str, prefix: str) -> Iterable[Entry]:
        """What a checkpoint of adapter `name` holds beside the tensors of layers, with `prefix` before the keys."""
        return ()

    @inference_mode_off()
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """float16, bfloat16 and float8 tensors of an adapter become float32, which training needs."""
        if autocast_adapter_dtype and "Whole" not in adapter_class(self.peft_config[adapter_name]).bases:
            for owner in (self, *layers(self.model)):
                owner.upcast(adapter_name)

    # ----------------------------------------------------------------------------------------------- trained biases
    def _own_biases(self, name: str, config: Any) -> None:
        """With `bias="all"` or `"..._only"`, train the biases; keep their old values for when the adapter is off."""
        bias = getattr(config, "bias", "none")
        if bias == "none":
            return
        self.bias_owner, self.biases_on = name, True
        for entry in entries_of_biases(self.model, name, bias, ""):
            parameter = entry.box[entry.key]
            self.biases[entry.saved] = (parameter, parameter.data.clone())
            parameter.requires_grad = not config.inference_mode and name in self.active_adapters

    @inference_mode_off()
    def _use_biases(self) -> None:
        """Swap trained and original biases so that the trained ones are in use while their adapter is."""
        on = self.bias_owner in self.active_adapters and not self._disabled
        if on != self.biases_on:
            for layer in layers(self.model):
                if layer.merged and layer.base.has_backup("bias"):  # that would be the wrong one of the two
                    layer.unmerge()
            for key, (parameter, other) in self.biases.items():
                self.biases[key] = (parameter, parameter.data)
                parameter.data = other.to(parameter)  # the model may have moved since
            self.biases_on = on

    def trained_bias(self, key: str) -> Tensor:
        """The trained values of a bias, in use or not."""
        parameter, other = self.biases[key]
        return parameter.data if self.biases_on else other

    @inference_mode_off()
    def _restore_biases(self) -> None:
        for parameter, other in self.biases.values():
            if self.biases_on:
                parameter.data = other.to(parameter)
            parameter.requires_grad = False
        self.biases, self.bias_owner, self.biases_on = {}, None, True

    # -------------------------------------------------------------------------------------------------------- running
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate; takes `task_ids` and `adapter_names` as `forward` does."""
        hooks = self._enable_peft_forward_hooks(*args, **kwargs)
        with hooks, self._growing(args, kwargs):
            return self.model.generate(*args, **self._for_model(kwargs))

    def _growing(self, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """While `generate` runs, each pass notes how far beyond the given input it reaches: see `Growth`."""
        length = length_of(args, kwargs) if self.context.now.by_sample else None
        return nullcontext() if length is None else self.context.telling(input_length=length)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """While it is open, `adapter_names` gives every sample of the batch its adapter; adapters know the inputs."""
        return self._tell(args, kwargs)

    # ----------------------------------------------------------------------------------------------- which adapter
    def _check_switching(self) -> None:
        if self.biases:
            check_biases(self.model)

    def _switched(self) -> None:
        self._use_biases()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        for parameter, _ in self.biases.values():
            parameter.requires_grad = self.bias_owner in self.active_adapters and not inference_mode

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if self.bias_owner == adapter_name:
            self._restore_biases()

    # -------------------------------------------------------------------------------------------------------- merging
    def _merge(self, *args: Any, **kwargs: Any) -> None:
        tying.warn_of_tied(self)
        super()._merge(*args, **kwargs)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        tying.note_untied(model)
        return model

    def unload(self) -> nn.Module:
        model = super().unload()
        self._restore_biases()
        return model

    def _unload(self, names: list[str]) -> nn.Module:
        if self.growth is not None:
            self.growth.remove()
            self.growth = None
        return super()._unload(names)

    # ---------------------------------------------------------------------------------------------------------- other
    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's own configuration as a dict."""
        return model_config(model)


class Growth:
    """A hook before a model's passes: while `generate` runs, it notes how far beyond the given input each reaches."""

    def __init__(self, context: Context):
        self.context = context

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        told = self.context.now
        if told.input_length is not None:
            now, cache = length_of(args, kwargs) or 0, kwargs.get("past_key_values")
            so_far = max(now, told.input_length) if cache is None else cached_tokens(cache) + now
            told.generated = so_far - told.input_length


def length_of(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many tokens a model's arguments hold for each sample, or None when they hold none."""
    names = "inputs_embeds", "input_ids", "inputs"
    given = next((t for t in (*map(kwargs.get, names), *args[:1]) if isinstance(t, Tensor)), None)
    return None if given is None else given.shape[min(1, given.dim() - 1)]


def tuner_class(peft_type: Any) -> type[BaseTuner]:
    """The class of models with adapters of that method: one of its own, or else a plain one.

    Raises `UnsupportedFeatureError` for what is no such method.
    """
    if peft_type in PeftType.__members__:
        registry.load_model((method := PeftType(peft_type)).value)
        if method not in TUNERS and method in ADAPTERS:
            name, own = f"{CONFIGS[method].__name__.removesuffix('Config')}Model", {"__doc__": BaseTuner.__doc__}
            globals()[name] = type(name, (BaseTuner,), {**own, "__module__": __name__}, method=method)
        if method in TUNERS:
            return TUNERS[method]
    raise UnsupportedFeatureError(f"peft_type {peft_type!r} is not in this release of minipeft.")


def __getattr__(name: str) -> Any:
    """Tuner classes, by name: so pickle finds the plain ones."""
    known = registry.TUNERS | {f"{c.__name__.removesuffix('Config')}Model": kind for kind, c in CONFIGS.items()}
    if name not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tuner_class(known[name])
