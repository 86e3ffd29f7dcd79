"""The theory of minipeft, in one page.

An *operator* is anything with `op(x) -> y` and `op.read() -> (W, b)`. The frozen base layer is one (bases.py); an
adapter around an operator is another. They obey one law:

    op(x) == base.apply(x, *op.read())          running it equals merging it

Everything common is written once from it: merging, safe merging, mixed batches, several active adapters, merging into
a quantised layer. A method says how it acts by the class it derives from:

    Delta        W' = W + dW                       LoRA, VeRA, ...: give `delta`, and `branch` when it can be cheaper
    Factored     W' = W + up down                  OSF, VB-LoRA, ...: give `factors`
    Transform    W', b' = f(W, b)                  trainable tokens, ...: give `fold`
    Activation   y = post(inner(pre(x)))           OFT, IA3, ...: give `pre` (linear) and `post` (affine)
    Routed       depends on the input, no merge    Poly, ...: give `forward`
    Replacement  another module in the layer's place   LN tuning: give `replacement`

Shapes: W is (out, in) or (out, in / groups, *kernel) or, for an embedding, (dim, tokens); b is (out,) or None.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import registry
from .boxes import BOXES, HOLDERS, Column
from .config import CONFIGS, PeftConfig, PeftType
from .errors import ConfigError, MergeError, UnsupportedFeatureError, UnsupportedLayerError
from .stored import fingerprint

if TYPE_CHECKING:
    from .bases import Base, Whole
    from .layer import Layer
    from .state import Entry

Rows = Callable[[slice], Tensor]  # gives the rows of a matrix that a slice says
ADAPTERS: dict[PeftType, list[type[Adapter]]] = {}  # more than one class where a field of the configuration chooses


def variants(config: PeftConfig) -> list[str]:
    """The fields of a configuration that ask for a variant of its method: `["use_dora"]`."""
    return [field for field in registry.VARIANTS.get(config.method.value, ()) if getattr(config, field)]


def adapter_class(config: PeftConfig) -> type[Adapter]:
    """The class that a configuration asks for, for example DoRA for a LoRA configuration with `use_dora`.

    It is `Adapter` itself for a method that adapts whole modules in a way of its own.
    """
    for field in variants(config):
        registry.load_variant(config.method.value, field)
    return next((cls for cls in reversed(ADAPTERS.get(config.method, ())) if cls.chosen_by(config)), Adapter)


def method_class(config: PeftConfig) -> type[Adapter]:
    """The class of a configuration's method, whichever of its variants it asks for."""
    return ADAPTERS.get(config.method, [Adapter])[0]


class Adapter(nn.Module):
    """One adapter on one layer: a column of the layer's slots.

    PEFT's live names put the parameter first and the adapter second, so `self.lora_A = module` stores the module at
    `layer.lora_A[self.name]`, and reading `self.lora_A` takes it from there: the parameters, buffers and modules of an
    adapter are a view of its layer's boxes. The same holds for plain values: after `self.scaling = 2.0`, code that
    knows PEFT finds `layer.scaling["default"] == 2.0`. What the class has a value for, such as `idle`, is its own.
    """

    prefix: ClassVar[str]  # slots that start with it are trained and saved
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")  # kinds of base layer it can adapt, by Base class name
    embedding_slots: ClassVar[Mapping[str, str]] = {}  # PEFT: slots that have other names on an embedding
    method: ClassVar[PeftType]
    asked_by: ClassVar[str | None] = None  # of a variant of a method: the field of the configuration that asks for it
    shares: ClassVar[bool] = False  # True: there are tensors beside the layers, without which these are not whole
    ties: ClassVar[bool] = False  # True: layers tied to an adapted embedding always follow it
    rewrites: ClassVar[bool] = False  # True: the frozen weights change for good, not by a start that may be converted
    must_agree: ClassVar[tuple[str, ...]] = ()  # fields that all adapters of a model must agree on
    forward_mixed: ClassVar[Any] = None  # (layer, groups, x, ...) runs a mixed batch that cannot be taken apart
    per_sample: ClassVar[Any] = None  # per_sample(config, inputs): what a pass means to each sample, see Pass.by_sample
    inputs: ClassVar[tuple[str, ...]] = ()  # arguments of a call that are for `per_sample`, and not for the model

    base: Base
    name: str
    config: Any
    path: str
    idle: bool = False  # True: hot swapping put an adapter in its place that leaves this layer alone
    tied_to: Adapter | None = None  # the adapter whose tensors it shares, see `tie_to`

    def __init_subclass__(cls, config: type[PeftConfig] | None = None, variant: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if config is not None:
            if config._method is None or CONFIGS[config._method] is not config:
                example = f'class {config.__name__}({config.__bases__[0].__name__}, method="A_NAME")'
                raise TypeError(f"{config.__name__} needs a peft_type of its own, which files will name: {example}.")
            cls.method, cls.asked_by = config._method, variant
            own = lambda other: (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
            ADAPTERS[cls.method] = [*(k for k in ADAPTERS.get(cls.method, ()) if not own(k)), cls]

    def __init__(self, layer: Layer, name: str, config: PeftConfig, path: str):
        super().__init__()
        vars(self).update(name=name, config=config, path=path)
        self.move_to(layer)

    @property
    def layer(self) -> Layer:
        """The layer that it stands on. That holds it, and not the other way round: a dropped model goes at once."""
        return self.__dict__["place"]()

    def __setattr__(self, slot: str, value: Any) -> None:
        if slot in self.__dict__ or hasattr(type(self), slot):  # its own: `config`, `idle`, ...
            object.__setattr__(self, slot, value)
            return
        if not self.base.reads_vectors:
            slot = self.embedding_slots.get(slot, slot)
        self.layer.put(slot, self.name, value, isinstance(value, Tensor) and self.is_saved(slot, self.config))

    def __getattr__(self, slot: str) -> Any:
        own = self.__dict__
        if not slot.startswith("__") and "_modules" in own:  # not half built, by copy or pickle
            layer, name = own["place"](), own["name"]
            if not own["base"].reads_vectors:
                slot = self.embedding_slots.get(slot, slot)
            held: Any = layer._modules.get(slot, vars(layer).get(slot))
            if isinstance(held, HOLDERS) and name in held:
                return held[name]
        raise AttributeError(f"{self} has no {slot!r}")

    def has(self, slot: str) -> bool:
        """Whether it has a tensor or module of that name, computed ones (`parametrize`) included."""
        return slot in self._parameters or slot in self._modules or slot in self._buffers

    def put_values(self, **values: Any) -> None:
        """Store several plain values at once: what setting them one by one does, in less time."""
        self.layer.put_values(self.name, values)

    def move_to(self, layer: Layer) -> None:
        """Stand on `layer` from now on, which has taken over the slots."""
        place = weakref.ref(layer)
        columns = {kind: Column(place, self.name, kind) for kind in BOXES}
        vars(self).update(place=place, base=layer.base, training=layer.training, **columns)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key not in BOXES}
        return {**state, "place": None}  # a copied layer moves its adapters to itself

    # ------------------------------------------------------------------------------------------ what a method gives
    @classmethod
    def chosen_by(cls, config: Any) -> bool:
        """Whether `config` means this class, where several share a peft_type. The last one that it means is taken."""
        return cls.asked_by is None or bool(getattr(config, cls.asked_by))

    @classmethod
    def for_base(cls, base: Base) -> type[Adapter]:
        """The class for layers of that kind: a variant of a method may leave some to the method itself."""
        return cls

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> Any:
        """Complete or refuse a configuration before any layer is looked for.

        It may also change the model itself, if it returns a function that undoes that.
        """

    @classmethod
    def share(cls, config: Any, found: list[tuple[str, Base]], existing: Any) -> dict[str, Any]:
        """Tensors that all layers look at, by slot; `found` has each layer's path and base.

        `existing(slot)` gives those of earlier adapters, by name, or None. A slot "frod_V.query" is for the layers of
        the group "query" alone: they look at it as `frod_V`, and do not list it among their own tensors.
        """
        return {}

    @classmethod
    def group(cls, path: str) -> str:
        """Which group of layers the one at `path` belongs to, where tensors are shared by group."""
        return ""

    def after_load(self) -> None:
        """Make anew what is computed from saved tensors: a checkpoint was just written into the adapter."""

    @classmethod
    def extra_modules(cls, config: Any, model: nn.Module) -> dict[str, nn.Module]:
        """Modules of the adapter that stand beside the whole model, by slot; no layer looks at them."""
        return {}

    @classmethod
    def after_build(cls, config: Any, adapters: list[Adapter]) -> None:
        """Give the adapters of all layers, just built, what depends on how many there are and in which order."""

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        """Refuse a configuration that cannot stand beside the ones already on the model, by adapter name."""
        rewriting = [kind for kind in ADAPTERS.get(cls.method, ()) if kind.rewrites]
        mine = cls if cls.rewrites else None
        for name, other in others.items() if rewriting else ():  # there may be a thousand
            if other.peft_type != config.peft_type:
                continue
            theirs = next((kind for kind in rewriting if kind.chosen_by(other)), None)
            if theirs is not mine:
                one, two = (mine, adapter_class(other)) if mine else (cast(Any, theirs), cls)
                both = f"beside adapter '{name}' there would be {one.__name__} and {two.__name__}"
                raise ConfigError(f"{one.__name__} changes the frozen weights, so all adapters must be of it: {both}.")
        for field in cls.must_agree:
            for name, other in others.items():
                if getattr(other, field) != getattr(config, field):
                    raise ConfigError(
                        f"`{field}` must be the same for all {cls.method.value} adapters of a model. "
                        f"Got {getattr(config, field)}, but adapter '{name}' has {getattr(other, field)}."
                    )

    @classmethod
    def fits(cls, base: Base) -> bool:
        """Whether it can adapt layers of that kind."""
        return any(kind.__name__ in cls.bases for kind in type(base).__mro__)

    @classmethod
    def of_modules(cls) -> bool:
        """Whether it takes the place of whole modules, or of blocks of layers, instead of changing a layer's weight."""
        return not {"Whole", "Block"}.isdisjoint(cls.bases)

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Base) -> None:
        """Refuse a layer for a reason other than its kind."""

    @classmethod
    def changes_base(cls, config: Any) -> bool:
        """Whether building it changes the frozen weights, so that it must happen also when values are loaded."""
        return False

    @classmethod
    def convert_to_plain(cls, config: Any, tensors: dict[str, Tensor], initial: Any) -> tuple[Any, dict[str, Tensor]]:
        """(configuration, tensors) of a LoRA for the unchanged base model; `initial`: the untrained one."""
        raise UnsupportedFeatureError(f"path_initial_model_for_weight_conversion is not for {cls.method.value}.")

    @classmethod
    def convert_for_save(cls, config: Any, name: str, tensors: dict[str, Tensor], entries: list[Entry]) -> Any:
        """A checkpoint's tensors, for methods that save something else than they hold: that is in the entries."""
        return tensors

    @classmethod
    def convert_for_load(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the layers hold, from those of a checkpoint."""
        return tensors

    @classmethod
    def resize(cls, model: nn.Module, name: str, tensors: dict[str, Tensor], entries: list[Entry]) -> Any:
        """Before a checkpoint is loaded into an adapter that is there: take its sizes, where a method lets them vary.

        `entries`: the tensors that it goes into.
        Returns a function that undoes that, or None.
        """

    def build(self) -> None:
        """Create and initialise the parameters.

        Where a checkpoint's values follow, this happens on the meta device, and `base` reads as if it were there too:
        nothing is drawn or computed, and only shapes count.
        """
        raise NotImplementedError

    def tie_to(self, source: Adapter, fresh: bool = False) -> None:
        """Share the tensors of `source`, the same adapter on the embedding whose weight this layer uses too.

        `fresh`: both were just initialised. Called again before each run, so it must be cheap when nothing has changed.
        """
        raise UnsupportedFeatureError(f"{type(self).__name__} cannot be tied; leave '{self.path}' out of its targets.")

    def matches(self, source: Adapter) -> bool:
        """Whether the values are those that `tie_to` would give."""
        return all(map(torch.equal, self.parameters(), source.parameters()))

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the adapted operator for input `x`; `inner` is the operator inside."""
        raise NotImplementedError

    def low_rank(self) -> tuple[Tensor, Tensor, Any] | None:
        """A (r, in), B (out, r) and s, when `forward` is inner(x) + s B (A x) and no more than that: see batch.py."""
        return None

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights of the adapted operator, from those of the operator inside. Raises `MergeError` if there are none."""
        raise NotImplementedError

    def in_parts(self, b: Tensor | None) -> Parts | None:
        """How to do what `fold` does part by part, on a linear layer; None: not at all. Raises what `fold` would raise.

        Until W is written to, a part may also be read from `base`.
        """
        return None

    @classmethod
    def is_saved(cls, slot: str, config: Any) -> bool:
        """Whether a slot's tensors belong in a checkpoint."""
        return slot.startswith(cls.prefix)

    def index_bound(self, slot: str) -> Any:
        """What the numbers in a saved tensor of positions must be smaller than, also by row; None: no positions."""

    @classmethod
    def shared_index_bound(cls, slot: str, shared: Mapping[str, Any]) -> Any:
        """The same for one of the tensors that layers share; `shared` has all of them, by slot."""

    def is_trainable(self, slot: str) -> bool:
        """Whether the parameters of a slot of the method are trained, and not only kept."""
        return True

    @classmethod
    def saved_key(cls, slot: str, rest: str) -> str:
        """The end of a checkpoint key: the slot, and what follows the adapter's name in the live key."""
        return f"{slot}.{rest}" if rest else slot

    # ------------------------------------------------------------------------------------------------------- helpers
    def cast(self, x: Tensor, like: Tensor) -> Tensor:
        """`x` in the dtype of the adapter's tensor `like`, unless casting is switched off for this layer."""
        return x.to(like.dtype) if x.dtype != like.dtype and self.layer.cast_input_dtype_enabled else x

    def on_commit(self, action: Any) -> None:
        """Run `action()` once the adapter is accepted: the place to change frozen weights."""
        self.layer.on_commit.append(action)

    def initial_scaling(self) -> float:
        """The `scaling` of a new adapter, of which `set_scale` sets multiples."""
        return getattr(self.config, "scaling", 1.0)

    @property
    def device(self) -> torch.device:
        """While building: where tensors are made, which is the meta device where values follow."""
        return torch.device("meta") if self.base.on_meta else self.base.device

    def cast_to_base(self) -> None:
        """While building: move what is there to the frozen layer's device and dtype, before computing more from it."""
        self.layer.cast_adapter_to_base(self.name)

    def fingerprint(self) -> list[tuple[Any, Any]]:
        """(kind, value) of all that is trained or set on it, to notice changes; a cast is none."""
        scale = getattr(self, "scaling", None)
        values = [fingerprint(parameter) or (parameter.dtype, None) for parameter in self.parameters()]
        return [("scaling", scale if isinstance(scale, (int, float)) else None), *values]

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.name!r} on {self.path!r})"


class Delta(Adapter):
    """W' = W + dW. Gives `delta`, and `branch` where dW x is cheaper than forming dW."""

    def delta(self) -> Tensor:
        """dW, shaped like W."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """dW x."""
        dW = self.delta()
        return self.base.apply(self.cast(x, dW) if self.base.reads_vectors else x, dW)

    @property
    def by_weight(self) -> bool:
        """Whether `branch` forms dW and is dW x, without dropout: then one product with W + dW does for both."""
        return type(self).branch is Delta.branch

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.by_weight and inner is self.base and self.base.is_plain(x):
            return self.base.apply(x, *self.fold(*inner.read()))
        y = inner(x, *args, **kwargs)
        return (y + self.branch(x)).to(y.dtype)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta(), self.fold_bias(b)

    def fold_bias(self, b: Tensor | None) -> Tensor | None:
        """The bias of the adapted operator, from that of the operator inside."""
        return b

    def delta_rows(self) -> Rows:
        """The function that gives some rows of dW (out, in): of the whole, unless a method makes those alone."""
        return self.delta().__getitem__

    def in_parts(self, b: Tensor | None) -> Parts | None:
        if type(self).fold is not Delta.fold:
            return None
        dW = self.delta_rows()
        return Parts(lambda W, rows: W.add_(dW(rows)), self.fold_bias(b))


class Factored(Delta):
    """W' = W + up down. Gives `factors`; the slot `<prefix>dropout`, if there, acts on the input of `down`."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """up (out, k) and down (k, in)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        up, down = self.factors()
        return up @ down  # (out, in)

    def delta_rows(self) -> Rows:
        if type(self).delta is not Factored.delta:
            return super().delta_rows()
        up, down = self.factors()
        return lambda rows: up[rows] @ down

    def branch(self, x: Tensor) -> Tensor:
        up, down = self.factors()
        dropout = self._modules.get(f"{self.prefix}dropout")
        x = self.cast(x, down)
        return F.linear(F.linear(x if dropout is None else dropout(x), down), up)  # (..., out)


class Transform(Adapter):
    """W', b' = f(W, b). Gives `fold`; running it goes through the weights."""

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.base.called(x, *self.fold(*inner.read()), *args, **kwargs)


class Activation(Adapter):
    """y = post(inner(pre(x))). `pre` is linear and `post` affine, each on vectors that stand in the last dimension.

    Because they are, the merged weights follow: the rows of W pass through the adjoint of `pre`, its columns through
    the linear part of `post`. On a convolution, `pre` sees a row of the flattened weight: a patch.
    """

    mixes: ClassVar[bool] = False  # True: `pre` mixes features, on a convolution also those of different groups

    def pre(self, x: Tensor) -> Tensor:
        return x

    def post(self, y: Tensor) -> Tensor:
        return y

    def adjoint(self, rows: Tensor) -> Tensor:
        """`rows` through the adjoint of `pre`. A method that states it can be traced on a convolution too."""
        return torch.func.vjp(self.pre, torch.zeros_like(rows))[1](rows)[0]

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self.base.pointwise:
            return self.base.called(x, *self.fold(*inner.read()), *args, **kwargs)
        y = inner(self.pre(x).to(x.dtype), *args, **kwargs)
        return self.post(y).to(y.dtype)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if type(self).pre is not Activation.pre:
            rows = self.base.rows(W) if self.mixes else W.flatten(1)
            W = self.adjoint(rows).view(W.shape[0], -1, *W.shape[2:])
        if type(self).post is not Activation.post:
            zero = self.post(W.new_zeros(W.shape[0]))  # of zeros, unless `post` adds something
            W = (self.post(W.movedim(0, -1)) - zero).movedim(-1, 0)
            b = zero if b is None else self.post(b)
        return W, b

    def in_parts(self, b: Tensor | None) -> Parts | None:
        like: Any = {"dtype": torch.promote_types(self.base.dtype, torch.float32), "device": self.base.device}
        x, y = torch.zeros(1, self.base.in_features, **like), torch.zeros(self.base.out_features, **like)
        zero = self.post(y)
        if type(self).fold is not Activation.fold or (self.pre(x) is not x and zero is not y):
            return None
        if zero is y:  # all that it does is done by `pre`
            return Parts(lambda W, rows: self.adjoint(W), b)
        b = zero if b is None else self.post(b)
        return Parts(lambda W, columns: (self.post(W.t()) - zero).t(), b, axis=1, step=64)  # they lie far apart


class Routed(Adapter):
    """Depends on the input, so no fixed weight does the same: merging is refused."""

    @classmethod
    def fits(cls, base: Base) -> bool:
        return super().fits(base) and not base.needs_weights  # that is reached through its weights alone

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise MergeError(f"{type(self).__name__} depends on its input and cannot be merged into weights ({self.path}).")


class Replacement(Adapter):
    """Another module in the layer's place, of the same kind. Gives `replacement`."""

    bases = ("Whole",)
    base: Whole

    @property
    def replacement(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.replacement(x, *args, **kwargs)

    def fold(self, W: Any, b: Any) -> Any:
        return {name: attrgetter(name)(self.replacement) for name in self.base.tensors(self.base.leaf)}, None


class Parts(NamedTuple):
    """How W (out, in) is folded a few rows at a time, or columns: each part where it is, so without a second W."""

    fold: Callable[[Tensor, slice], Tensor]  # the same rows of W', from those of W, which it may write to
    bias: Tensor | None  # b'
    axis: int = 0  # 1: columns in the place of rows
    step: int = 1  # it takes a multiple of so many rows at a time


class Adapted:
    """The operator that an adapter makes of the operator inside it."""

    __slots__ = ("adapter", "inner")

    def __init__(self, adapter: Adapter, inner: Any):
        self.adapter, self.inner = adapter, inner

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(x, self.inner, *args, **kwargs)

    def read(self) -> tuple[Any, Any]:
        return self.adapter.fold(*self.inner.read())


def unsupported(cls: type[Adapter], module: nn.Module, path: str) -> UnsupportedLayerError:
    """The error for a layer whose kind `cls` cannot adapt."""
    leaf = getattr(getattr(module, "base", None), "leaf", module)
    kind, weight = type(leaf).__name__, leaf._parameters.get("weight")
    if weight is not None and type(weight) is not nn.Parameter:
        kind += f" with a weight of class {type(weight).__name__}"
    elif kind in cls.bases:  # another library's class of that name
        kind = f"{type(leaf).__module__}.{kind}"
    return UnsupportedLayerError(
        f"{cls.__name__} cannot adapt '{path}', a {kind}. It adapts layers of kind {', '.join(cls.bases)}."
    )
