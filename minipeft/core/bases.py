"""The kinds of frozen layer. Everything that depends on a layer's kind is here, and nothing about any method.

A `Base` is the operator that adapters are put around. It reads and writes the layer's weight in one canonical layout,
runs the layer with other weights, and knows the low-rank factors that suit its kind:

    Linear         W (out, in)                        factors nn.Linear(in, r), nn.Linear(r, out)
    Conv1D         transformers' (in, out) layer      the same
    Conv           W (out, in / groups, *kernel)      factors ConvNd(in, r, kernel), ConvNd(r, out, 1)
    Embedding      W (dim, tokens)                    factors as parameters (r, tokens), (dim, r)
    Attention      W = in_proj_weight (3 dim, dim)    as Linear; its out_proj is a Linear of its own
    Param          a bare nn.Parameter, 2-D or 3-D    as Linear, over all experts at once
    Whole          any module, as its named tensors   none
    Block          the same, called with hidden states; adapters have a dtype of their own
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .computed import Computed, computed, plain_class
from .errors import ConfigError, MergeError, UnsupportedLayerError
from .offload import device_of, loaded, running_device
from .stored import Backup, fingerprint, like, own_copy, put, sharded, whole

TORCH_FORWARDS = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)} | {
    cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
}
OWN_KINDS: dict[type[nn.Module], type[Base]] = {}  # classes of layers that have a kind of their own, see Base


class Base:
    """A frozen layer as an operator. `module` is what is called; `leaf` is the layer that holds the weights.

    The two differ only where adapters of two methods are nested: then `module` is the `Layer` inside.

    For a class of layers that is none of the kinds here, derive from the nearest and name the class:
    `class Scaled(Linear, layer=ScaledLinear)`. Every method that adapts the one kind then adapts the other.
    """

    pointwise = True  # the layer applies W to feature vectors one by one (False: reach it through its weights)
    needs_weights = False  # True: even an additive adapter must go through the weights
    forwards_attributes = False  # True: the modules around the layer read its attributes
    reads_vectors = True  # False: the input is indices, not feature vectors
    label = ""  # the class name that PEFT shows for such a layer
    weight_name, bias_name = "weight", "bias"
    backup: Backup | None = None  # what `write` replaced, by name; there while something is written that can be undone
    written: dict[str, Any] | None = None  # fingerprints of what `write` has stored; None when that was edited
    shares_weight = False  # True: other modules use the weight too, so `write` must leave that tensor to them
    shares_bias = False  # True: other modules use the bias too, so nothing else can be written to it
    tied_weight: Tensor | None = None  # that tensor, while the layer has one of its own
    on_meta = False  # True: it reads as if it were on the meta device, see `shapes_only`
    source: Base | None = None  # a layer with the same weight, while what is written is written there

    def __init_subclass__(cls, layer: type[nn.Module] | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if layer is not None:
            OWN_KINDS[layer] = cls

    def __init__(self, module: nn.Module, inside: Base | None = None):
        self.module = module
        self.inside = None if inside is None else inside.innermost
        self.leaf: Any = module if inside is None else inside.leaf
        self.label = self.label or type(self).__name__

    @property
    def innermost(self) -> Base:
        """The one Base that keeps what is replaced, of those of nested layers."""
        return self if self.inside is None else self.inside

    # -------------------------------------------------------------------------------------------------- the operator
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(x, *args, **kwargs)

    def read(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) of the frozen layer, canonical, whole and dequantised; what was there before a merge, if one is on."""
        with loaded(self.leaf):
            W, b = self.originals()
            return self.canonical(whole(W)), None if b is None else whole(b)

    def originals(self) -> tuple[Any, Any]:
        """What `stored` gives, or gave before a merge, if one is on."""
        (W, b), innermost = self.stored(), self.innermost
        if innermost.source is not None:
            W = innermost.source.originals()[0]
        if innermost.tied_weight is not None:
            W = innermost.tied_weight
        elif innermost.backup is not None:
            W = innermost.backup.get("weight", W)
        return W, b if innermost.backup is None else innermost.backup.get("bias", b)

    @property
    def changed(self) -> bool:
        """Whether something is written that `restore` can undo."""
        return self.innermost.backup is not None

    def current(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) as the layer holds them now, merged or not: canonical, whole and dequantised."""
        with loaded(self.leaf):
            W, b = self.stored()
            return self.canonical(whole(W)), None if b is None else whole(b)

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """Store (W, b) in place, in the layer's own layout and dtype.

        The first time, what was there is kept for `restore`, in `backup`: tensors that must move, be cast and be copied
        with the layer. A bias that already has those values is left alone. Raises `MergeError`, with nothing written,
        when there is no place for them.
        """
        self.check_writes()
        values = {"weight": self.canonical(W)}
        if b is not None and self.takes_bias(b):
            values["bias"] = b
        self.untie()
        stored: dict[str, Any] = dict(zip(("weight", "bias"), self.stored()))
        before = {name: stored[name] for name in values}
        if (made := self.computed) is not None:
            before |= made.copies()
            made.assign(values.pop("weight"))
        self.back_up(before)
        for name, value in values.items():
            put(stored[name], value)
        self.note_written()

    def takes_bias(self, b: Tensor | None) -> bool:
        """Whether the layer's bias is to become b. Raises `MergeError` when it cannot."""
        self.check_bias(b)
        if b is None or not self.replaces_bias(b):
            return False
        if (made := computed(self.leaf, self.bias_name)) is not None:
            raise MergeError(
                f"The {type(self.leaf).__name__} computes its bias by {made.kind}, and the adapter changes it: "
                "make it a plain parameter first, or keep the adapter unmerged."
            )
        if self.innermost.shares_bias:
            raise MergeError(
                f"The adapter changes the bias of the {type(self.leaf).__name__}, which other modules use too. "
                "Give each layer a bias of its own, or keep the adapter unmerged."
            )
        return True

    def replaces_bias(self, b: Tensor) -> bool:
        """Whether b is not what the layer has, or had before it was written to."""
        bias = self.stored()[1]
        return bias is not None and (self.has_backup("bias") or not torch.equal(whole(bias), b.to(bias.dtype)))

    def has_backup(self, name: str) -> bool:
        """Whether the tensor of that name is overwritten, and kept."""
        return self.innermost.backup is not None and name in self.innermost.backup

    def untie(self) -> None:
        """Give the layer a weight of its own, when others use the one it has."""
        innermost = self.innermost
        if innermost.shares_weight and innermost.tied_weight is None:
            weight = innermost.tied_weight = self.stored()[0]
            setattr(self.leaf, self.weight_name, nn.Parameter(own_copy(weight), weight.requires_grad))

    def back_up(self, tensors: dict[str, Tensor]) -> Backup:
        """Keep copies of tensors that are going to be overwritten, by name, unless they are kept already."""
        innermost = self.innermost
        backup = innermost.backup = innermost.backup or Backup()
        for name, tensor in tensors.items():
            if name not in backup and not (name == "weight" and innermost.tied_weight is not None):
                backup.add(name, own_copy(tensor))
                if tensor is self.stored_by_name().get(name):  # not what it is computed from
                    backup.note_version(name, tensor)
        return backup

    def check_written(self) -> None:
        """Raise `MergeError` when the weights were edited since they were written, which `restore` would lose."""
        if self.edited:
            raise MergeError(
                f"The weights of the {type(self.leaf).__name__} were changed while an adapter was merged into them; "
                "taking it out again would lose that. Change weights while nothing is merged, or keep them as they "
                "are now with `merge_and_unload`."
            )

    @property
    def edited(self) -> bool:
        """Whether the weights are not those that were written. A cast or a move is no edit."""
        innermost = self.innermost
        if innermost.backup is None:
            return False
        return innermost.written is None or any(
            old is not None and new is not None and old != new and old[0] == new[0]
            for old, new in ((innermost.written.get(name), new) for name, new in self.fingerprints().items())
        )

    def note_written(self) -> None:
        """Note what is stored now, to notice edits."""
        if (backup := self.innermost.backup) is not None:
            self.innermost.written = self.fingerprints()
            for name in [*backup.versions]:
                backup.note_version(name, self.stored_by_name()[name])

    def stored_by_name(self) -> dict[str, Any]:
        """What `stored` gives, by the names under which it is kept."""
        return dict(zip(("weight", "bias"), self.stored()))

    def fingerprints(self) -> dict[str, Any]:
        """Of the tensors that have been written, by name."""
        weight, bias = self.stored()
        made = self.computed
        if made is None:
            tensors: dict[str, Any] = {"weight": weight}
        else:  # buffers may change by running
            tensors = {name: tensor for name, tensor in made.tensors().items() if isinstance(tensor, nn.Parameter)}
        if self.has_backup("bias"):
            tensors["bias"] = bias
        return {name: fingerprint(tensor) for name, tensor in tensors.items()}

    def check_writes(self, W: Tensor | None = None) -> None:
        """Raise `MergeError` when nothing can be written to the layer's weight, or not W (canonical)."""
        if W is not None and not W.is_meta and (made := self.computed) is not None:
            before = made.copies()
            made.assign(self.canonical(W))
            made.restore(before)

    def check_bias(self, b: Tensor | None) -> None:
        """Raise `MergeError` when there is a bias to write, other than zero, and the layer has none."""
        if b is not None and self.stored()[1] is None and b.any():
            raise MergeError(
                f"The adapter gives the {type(self.leaf).__name__} a bias, but the layer has none to write it to. "
                "Make the layer with bias=True, or keep the adapter unmerged."
            )

    def is_stored(self, key: str) -> bool:
        """Whether a key below the layer's module is that of a tensor that merging may overwrite."""
        made = self.computed
        return key in (self.weight_name, self.bias_name) or (made is not None and key in made.tensors())

    def probe(self) -> Tensor | None:
        """A small input, if the class of the layer has a `forward` of its own: that may not do what the weights say."""
        return None

    def drawn(self, *shape: int) -> Tensor | None:
        """Numbers without any order, the same each time, in the dtype of the layer if it computes in that."""
        if self.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return None
        return (torch.arange(math.prod(shape), dtype=torch.float64) ** 2).cos().view(shape).to(self.dtype)

    def outcome(self, probe: Tensor, op: Any = None) -> Tensor | None:
        """What the layer, or an operator around it, makes of a probe; None when that tells nothing."""
        try:
            y = (op or self.leaf)(probe.to(self.device))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it wants something else
            return None
        return y if isinstance(y, Tensor) and not y.is_meta else None

    def check_whole(self) -> None:
        """Raise `MergeError` when the weight is not here: with some libraries a process has a flat piece or nothing."""
        weight = self.stored()[0]
        if weight.dim() < 2:
            raise MergeError(
                f"The weight of the {type(self.leaf).__name__} has the shape {tuple(weight.shape)}: it is spread over "
                "several processes. Gather it first (`FullyShardedDataParallel.summon_full_params`, "
                "`deepspeed.zero.GatheredParameters`), or merge before the model is distributed."
            )

    @property
    def overwrites(self) -> bool:
        """Whether the weight can be changed where it is: the stored numbers are those of W, and all are here."""
        if type(self) not in (Linear, Conv1D) or self.computed is not None or self.probe() is not None:
            return False
        weight = self.stored()[0]
        return not (sharded(weight) or weight.is_inference() or weight.dim() < 2 or 0 in weight.stride())

    def restore(self) -> None:
        """Put back, bit for bit, what `write` replaced. Call `check_written` before."""
        innermost = self.innermost
        if innermost.backup is not None:
            for name, tensor in zip(("weight", "bias"), self.stored()):
                if tensor is not None and name in innermost.backup:
                    innermost.backup.restore(name, tensor)
            if (made := self.computed) is not None:
                made.restore(innermost.backup)
            if innermost.tied_weight is not None:
                setattr(self.leaf, self.weight_name, like(innermost.tied_weight, self.stored()[0]))
        self.release()

    def release(self) -> None:
        """Keep nothing any more."""
        self.innermost.backup = self.innermost.tied_weight = self.innermost.written = None

    def forget(self) -> None:
        """Make what was written permanent."""
        self.release()
        self.innermost.shares_weight = False

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer for input `x`, had it the weights (W, b)."""
        raise NotImplementedError

    def is_plain(self, x: Tensor) -> bool:
        """Whether calling the layer is W x + b and nothing else, in a precision in which W may as well be W + dW."""
        return False

    def called(self, x: Tensor, W: Any, b: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The same as when the layer itself is called: hooks on it act."""
        if not has_hooks(self.leaf):
            return self.apply(x, W, b, *args, **kwargs)
        stand_in = copy.copy(self.leaf)  # its own forward, so that no other thread runs it
        stand_in.forward = lambda x, *args, **kwargs: self.apply(x, W, b, *args, **kwargs)
        return stand_in(x, *args, **kwargs)

    def original(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer as it was before a merge, if one is on: its own forward and hooks on it act."""
        weight, bias = self.originals()
        own = self.leaf._parameters
        if self.packed or self.computed is not None or sharded(weight) or own.get(self.weight_name) is None:
            return self.called(x, *self.read(), *args, **kwargs)
        stand_in = copy.copy(self.leaf)  # so that no other thread runs it
        vars(stand_in).pop("forward", None)  # whatever wraps the original
        stand_in._parameters = {**own, self.weight_name: weight} | ({self.bias_name: bias} if bias is not None else {})
        return stand_in(x, *args, **kwargs)

    # ---------------------------------------------------------------------------------------------------- its layout
    def stored(self) -> tuple[Tensor, Tensor | None]:
        """The layer's own weight and bias tensors."""
        return self.frozen, getattr(self.leaf, self.bias_name, None)

    def canonical(self, W: Tensor) -> Tensor:
        """Between the stored and the canonical layout; its own inverse."""
        return W

    @property
    def in_features(self) -> int:
        """Number of input features (for an embedding: of tokens)."""
        return self.leaf.in_features

    @property
    def out_features(self) -> int:
        """Number of output features."""
        return self.leaf.out_features

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W in the canonical layout."""
        return self.out_features, self.in_features

    @property
    def fan_in(self) -> int:
        """Length of a row of the flattened weight."""
        return self.in_features

    @property
    def patch_size(self) -> int:
        """Length of the vectors that a rotation turns: what `rows` meet."""
        return self.fan_in

    def rows(self, W: Tensor) -> Tensor:
        """W as rows (out, patch): what stands before a whole patch of the input."""
        return W.flatten(1)

    @property
    def frozen(self) -> Tensor:
        """The layer's own weight tensor."""
        return weight_of(self.leaf, self.weight_name)

    @property
    def computed(self) -> Computed | None:
        """How the layer computes its weight, when that is no parameter."""
        return computed(self.leaf, self.weight_name)

    @property
    def cell(self) -> Tensor:
        """The tensor that holds the layer's weight, or the first of those that it is computed from."""
        made = self.computed
        return self.frozen if made is None else next(iter(made.tensors().values()))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that new adapter parameters take."""
        return self.frozen.dtype

    @property
    def device(self) -> torch.device:
        """Device that new adapter parameters take: where the layer runs."""
        return running_device(self.leaf, self.frozen)

    def shapes_only(self) -> Base:
        """The same layer as it looks where only shapes count: on the meta device."""
        other: Any = copy.copy(self)
        W, b = torch.empty(self.shape, dtype=self.dtype, device="meta"), self.stored()[1]
        vars(other).update(on_meta=True, read=lambda: (W, None if b is None else b.to("meta")))
        return other

    @property
    def packed(self) -> bool:
        """Whether the numbers stored are quantised ones, and not those of W."""
        return False

    # ---------------------------------------------------------------------------------------------- low-rank factors
    def down(self, r: int) -> Any:
        """The factor A of a product B A, initialised as torch does."""
        return nn.Linear(self.in_features, r, bias=False)

    def up(self, r: int, bias: bool = False) -> Any:
        """The factor B of a product B A."""
        return nn.Linear(r, self.out_features, bias)

    def factors(self, r: int, bias: bool = False) -> tuple[Any, Any]:
        """Both factors of a product B A."""
        return self.down(r), self.up(r, bias)

    @staticmethod
    @torch.no_grad()
    def reset_factors(A: Any, B: Any) -> None:
        """Start factors as LoRA does: A as torch does, B zero."""
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        for zero in B._parameters.values():
            if zero is not None:
                zero.zero_()

    def low_rank_delta(self, A: Any, B: Any, scale: Any = 1.0) -> Tensor:
        """scale * B A, shaped like W."""
        return self.matrix(B) @ (self.matrix(A) * scale)

    def low_rank_forward(self, x: Tensor, A: Any, B: Any) -> Tensor:
        """B (A x), without forming B A. The factors are called, so that hooks on them act."""
        return B(A(x))

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Any, B: Any, scale: Any = 1.0, gain: Tensor | None = None
    ) -> Tensor:
        """y + gain * scale * B (A x); `gain` is `output_scale`."""
        branch = self.low_rank_forward(x, A, B)
        if gain is not None:
            branch = gain * branch
        return y + scale * branch if isinstance(scale, Tensor) else torch.add(y, branch, alpha=scale)

    @staticmethod
    def matrix(factor: Any) -> Tensor:
        """The matrix of a factor: (r, in) of A, (out, r) of B, kernels flattened; with what hooks on it do."""
        return effective_matrix(factor) if has_hooks(factor) else factor.weight

    # ------------------------------------------------------------------------------------------------------- vectors
    def input_scale(self, v: Tensor) -> Tensor:
        """A vector over the input features, as it meets a row of the flattened weight."""
        return v.flatten()

    def output_scale(self, v: Tensor) -> Tensor:
        """A vector over the output features, as it meets the layer's output."""
        return v.flatten()

    def gain_shape(self, n: int, inward: bool) -> tuple[int, ...]:
        """The shape in which PEFT stores a scale for n input features (`inward`) or n output features."""
        return (1, n) if inward else (n, 1)

    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape in which PEFT stores one magnitude for each output feature."""
        return (self.out_features,)

    def require_divisible(self, by: int, field: str, path: str, sides: str = "in_features out_features") -> None:
        """Raise `UnsupportedLayerError` unless `by`, which is what `field` says, divides the sizes of the layer."""
        for side, size in (("in_features", self.in_features), ("out_features", self.out_features)):
            if side in sides.split() and (by <= 0 or size % by):
                raise UnsupportedLayerError(f"{side} of '{path}', {size}, must be divisible by `{field}`, {by}.")

    def same(self, other: Base) -> bool:
        """Whether `other` is the same weight of the same layer."""
        return self.leaf is other.leaf and self.weight_name == other.weight_name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.leaf})"


@contextmanager
def inference_mode_off() -> Iterator[None]:
    """While it is open, torch.inference_mode() is off: the tensors that are made can be trained."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False):
        yield


@contextmanager
def autocast_off() -> Iterator[None]:
    """While it is open, torch.autocast is off: what is computed for good is computed in the dtypes that are given."""
    on = [kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if _autocasts(kind)]
    with ExitStack() as stack:
        for kind in on:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _autocasts(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:  # no such device in this release
        return False


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """module.weight, found in less time than nn.Module.__getattr__ takes where it is a plain parameter."""
    weight = module._parameters.get(name)
    if weight is None:
        made = computed(module, name)
        return getattr(module, name) if made is None else made.value()
    return weight


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody's hooks act on the module's input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def effective_matrix(factor: Any) -> Tensor:
    """The matrix (n_out, n_in) by which a linear module acts when it is called: hooks may change what its weight does.

    Raises `MergeError` when no matrix does that.
    """
    n = factor.in_features
    x = torch.eye(n + 2, n, dtype=factor.weight.dtype, device=factor.weight.device)  # one row stays zero
    x[-1] = torch.linspace(-1, 1, n)
    *rows, zero, probe = factor(x)
    W = torch.stack([row - zero for row in rows], 1)  # (n_out, n_in)
    bias = getattr(factor, "bias", None)
    bias = torch.zeros_like(zero) if bias is None else bias
    if not (torch.allclose(W @ x[-1], probe - zero, rtol=1e-3, atol=1e-5) and torch.allclose(zero, bias, atol=1e-5)):
        raise MergeError(
            f"A hook on {factor} makes something of it that no matrix does, so it cannot be merged: remove the hook, "
            "or keep the adapter unmerged."
        )
    return W


class OnPatches(nn.Module):
    """A convolution as the linear module that it is on patches (n, in * taps); hooks on it act."""

    def __init__(self, conv: Any):
        super().__init__()
        self.weight, self.bias = conv.weight.flatten(1), conv.bias
        self.in_features = self.weight.shape[1]
        self.conv = copy.copy(conv)
        vars(self.conv).pop("forward", None)  # whatever wraps the original
        self.conv.stride = self.conv.dilation = (1,) * (conv.weight.dim() - 2)
        self.conv.padding, self.conv.padding_mode = (0,) * len(self.conv.stride), "zeros"
        self.shape = conv.in_channels, *conv.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(1, self.shape)).flatten(1)


def dropout(p: float) -> nn.Module:
    """nn.Dropout(p); for p = 0 an nn.Identity, which PEFT puts there too."""
    return nn.Dropout(p) if p else nn.Identity()


class Linear(Base):
    """nn.Linear, and whatever else has `in_features`, `out_features` and a 2-D `weight`."""

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    def probe(self) -> Tensor | None:
        if type(self) is not Linear or plain_class(self.leaf).forward in TORCH_FORWARDS:
            return None
        return self.drawn(2, self.in_features)

    def is_plain(self, x: Tensor) -> bool:
        leaf, name = self.leaf, self.weight_name
        weight = leaf._parameters.get(name, vars(leaf).get(name))  # FSDP and DataParallel put plain tensors there
        own = type(leaf).forward is nn.Linear.forward and "forward" not in vars(leaf) and self.module is leaf
        if not own or has_hooks(leaf) or leaf._backward_hooks or leaf._backward_pre_hooks or type(self) is not Linear:
            return False
        if type(weight) not in (nn.Parameter, Tensor) or sharded(weight) or _autocasts(x.device.type):
            return False
        return weight.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)


class Conv1D(Linear):
    """transformers.pytorch_utils.Conv1D: a linear layer that stores its weight (in, out)."""

    label = "Linear"

    def canonical(self, W: Tensor) -> Tensor:
        return W.t()

    @property
    def in_features(self) -> int:
        return self.leaf.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.leaf.weight.shape[1]


class Conv(Base):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d, with stride, padding, dilation and groups."""

    pointwise = False

    def __init__(self, module: nn.Module, inside: Base | None = None):
        super().__init__(module, inside)
        self.label = f"Conv{self.dims}d"

    @property
    def in_features(self) -> int:
        return self.leaf.in_channels

    @property
    def out_features(self) -> int:
        return self.leaf.out_channels

    @property
    def shape(self) -> tuple[int, ...]:
        m = self.leaf
        return m.out_channels, m.in_channels // m.groups, *m.kernel_size

    @property
    def dims(self) -> int:
        """Number of dimensions that the kernel moves along."""
        return len(self.leaf.kernel_size)

    @property
    def fan_in(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def patch_size(self) -> int:
        return self.fan_in * self.leaf.groups

    def rows(self, W: Tensor) -> Tensor:
        groups = self.in_features // W.shape[1]
        parts = [part.flatten(1) for part in W.chunk(groups)]
        return parts[0] if groups == 1 else torch.block_diag(*parts)

    def canonical(self, W: Tensor) -> Tensor:
        """The same, with only its own group's channels in each row. W may have all of them: see `apply`."""
        m = self.leaf
        if W.shape[1] == self.shape[1]:
            return W
        parts = W.unflatten(0, (m.groups, -1)).unflatten(2, (m.groups, -1)).movedim(2, 1)  # (g, g, out / g, in / g, *)
        own = torch.eye(m.groups, dtype=torch.bool, device=W.device)
        if parts[~own].any():
            raise MergeError(
                f"The adapter mixes the groups of a convolution with groups={m.groups}, so no weight of the layer does "
                "the same; keep the adapter unmerged."
            )
        return parts[own].flatten(0, 1)

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        m = self.leaf
        W, b = W.to(x.dtype), None if b is None else b.to(x.dtype)
        if W.shape[1] == self.shape[1]:
            return m._conv_forward(x, W, b)
        padding = m.padding  # W over all input channels: an adapter mixes the groups
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0
        return getattr(F, f"conv{W.dim() - 2}d")(x, W, b, m.stride, padding, m.dilation)

    def probe(self) -> Tensor | None:
        m, cls = self.leaf, plain_class(self.leaf)
        if cls.forward in TORCH_FORWARDS and cls._conv_forward in TORCH_FORWARDS:
            return None
        size = [(k - 1) * d + 2 for k, d in zip(m.kernel_size, m.dilation)]
        return self.drawn(1, m.in_channels, *size)

    def down(self, r: int) -> Any:
        m = self.leaf
        window = (m.kernel_size, m.stride, m.padding, m.dilation)
        padding = {"padding_mode": m.padding_mode} if m.padding_mode != "zeros" else {}  # not all subclasses take it
        return plain_class(m)(m.in_channels, r, *window, bias=False, **padding)

    def up(self, r: int, bias: bool = False) -> Any:
        if r % self.leaf.groups:
            groups = self.leaf.groups
            raise ConfigError(f"On a convolution with groups={groups} the rank must be a multiple of that, got r={r}.")
        return plain_class(self.leaf)(r, self.out_features, 1, groups=self.leaf.groups, bias=bias)

    def low_rank_delta(self, A: Any, B: Any, scale: Any = 1.0) -> Tensor:
        if self.leaf.groups > 1:
            raise MergeError(
                f"Low-rank factors on a convolution with groups={self.leaf.groups} mix the groups, "
                "so no weight of the layer does the same; keep the adapter unmerged."
            )
        return (self.matrix(B) @ (self.matrix(A) * scale)).view(self.shape)

    @staticmethod
    def matrix(factor: Any) -> Tensor:
        # of a factor with groups PEFT's norm takes the weight, and no weight of the layer is made of it
        hooked = factor.groups == 1 and has_hooks(factor)
        return effective_matrix(OnPatches(factor)) if hooked else factor.weight.flatten(1)

    def output_scale(self, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * self.dims)

    def gain_shape(self, n: int, inward: bool) -> tuple[int, ...]:
        return (1, n, *[1] * self.dims)

    def magnitude_shape(self) -> tuple[int, ...]:
        return (1, self.out_features, *[1] * self.dims)

    def input_scale(self, v: Tensor) -> Tensor:
        m = self.leaf
        taps = math.prod(m.kernel_size)
        rows = v.flatten().view(m.groups, 1, -1).expand(-1, m.out_channels // m.groups, -1)
        return rows.reshape(m.out_channels, -1).repeat_interleave(taps, 1)  # (out, in / groups * taps)


class Embedding(Base):
    """nn.Embedding. Canonically W is (dim, tokens): the layer multiplies W with a one-hot vector."""

    reads_vectors = False

    def canonical(self, W: Tensor) -> Tensor:
        return W.t()

    @property
    def in_features(self) -> int:
        return self.leaf.num_embeddings

    @property
    def out_features(self) -> int:
        return self.leaf.embedding_dim

    @property
    def fan_in(self) -> int:
        return self.out_features

    def probe(self) -> Tensor | None:
        own = plain_class(self.leaf).forward not in TORCH_FORWARDS
        return torch.arange(min(64, (self.in_features + 1) // 2)) if own else None

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        return self.look_up(x, W) * self._scale(W)

    def look_up(self, x: Tensor, W: Tensor) -> Tensor:
        """Columns x of W (n, tokens), as rows: (*x.shape, n)."""
        m = self.leaf
        return F.embedding(x, W.t(), m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)

    def down(self, r: int) -> Any:
        return nn.Parameter(torch.randn(r, self.in_features))

    def up(self, r: int, bias: bool = False) -> Any:
        if bias:
            raise UnsupportedLayerError("`lora_bias=True` is not supported for embeddings.")
        return nn.Parameter(torch.randn(self.out_features, r))

    @staticmethod
    @torch.no_grad()
    def reset_factors(A: Any, B: Any) -> None:
        A.zero_()  # PEFT: on an embedding A is zero and B normal
        B.normal_()

    def low_rank_delta(self, A: Any, B: Any, scale: Any = 1.0) -> Tensor:
        return B @ (A * scale)

    def low_rank_forward(self, x: Tensor, A: Any, B: Any) -> Tensor:
        return (self.look_up(x, A) * self._scale(A)) @ B.t()

    @staticmethod
    def matrix(factor: Any) -> Tensor:
        return factor

    def _scale(self, like: Tensor) -> Any:
        scale = getattr(self.leaf, "embed_scale", 1.0)  # Gemma 3 multiplies what it looks up
        return scale.to(like.dtype) if isinstance(scale, Tensor) else scale


def run_with(module: nn.Module, tensors: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A module's pass with other tensors in the place of its own, by path.

    While FSDP runs a module it has them as plain attributes, too, before which a parameter is not seen.
    """
    plain: list[tuple[dict[str, Any], str, Any]] = []
    for path in () if torch.compiler.is_compiling() else tensors:
        head, _, name = path.rpartition(".")
        if name in (own := vars(module.get_submodule(head))):
            plain.append((own, name, own[name]))
            own[name] = tensors[path]
    try:
        return functional_call(module, tensors, args, kwargs)
    finally:
        for own, name, tensor in plain:
            own[name] = tensor


class Attention(Linear):
    """nn.MultiheadAttention, through its in_proj_weight. Its out_proj is adapted as a layer of its own."""

    needs_weights, forwards_attributes, pointwise = True, True, False
    label = "MultiheadAttention"
    weight_name, bias_name = "in_proj_weight", "in_proj_bias"

    def __init__(self, module: nn.Module, inside: Base | None = None):
        super().__init__(module, inside)
        if not self.leaf._qkv_same_embed_dim:
            raise UnsupportedLayerError("Only same dim for query/key/value is supported for nn.MultiheadAttention.")
        if computed(self.leaf, self.weight_name) is not None:
            raise UnsupportedLayerError("nn.MultiheadAttention cannot be adapted when its in_proj_weight is computed.")

    @property
    def in_features(self) -> int:
        return self.leaf.embed_dim

    @property
    def out_features(self) -> int:
        return 3 * self.leaf.embed_dim

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        tensors = {"in_proj_weight": W.to(x.dtype)}
        if b is not None:
            tensors["in_proj_bias"] = b.to(x.dtype)
        return run_with(self.leaf, tensors, (x, *args), kwargs)


class Param(Base):
    """A bare nn.Parameter of a module: a matrix (out, in), or experts (experts, out, in) or (experts, in, out)."""

    needs_weights, forwards_attributes, pointwise = True, True, False
    label = "ParamWrapper"

    def __init__(self, module: nn.Module, inside: Base | None = None, name: str = ""):
        super().__init__(module, inside)
        self.inside, self.weight_name, self.bias_name = None, name, ""
        W = getattr(self.leaf, name)
        if W.dim() not in (2, 3):
            raise UnsupportedLayerError(f"Only 2-D and 3-D parameters can be adapted, but '{name}' is {W.dim()}-D.")
        # PEFT: expert weights count as (experts, out, in) unless their module has `is_transposed`
        self.transposed = W.dim() == 3 and getattr(self.leaf, "is_transposed", False)
        self.experts = W.shape[0] if W.dim() == 3 else 1
        self._out, self._inp = W.shape[-1:-3:-1] if self.transposed else W.shape[-2:]
        self.path = "base_layer." * _depth(module) + name

    @property
    def in_features(self) -> int:
        return self._inp

    @property
    def out_features(self) -> int:
        return self._out

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.leaf, self.weight_name).shape)

    def stored(self) -> tuple[Tensor, Tensor | None]:
        return getattr(self.leaf, self.weight_name), None

    def is_stored(self, key: str) -> bool:
        return key == self.path

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        return run_with(self.module, {self.path: W.to(self.dtype)}, (x, *args), kwargs)

    def down(self, r: int) -> Any:
        return nn.Linear(self.in_features, r * self.experts, bias=False)

    def up(self, r: int, bias: bool = False) -> Any:
        return nn.Linear(r * self.experts, self.out_features, bias=bias)

    def low_rank_delta(self, A: Any, B: Any, scale: Any = 1.0) -> Tensor:
        a = (A.weight * scale).view(self.experts, -1, self.in_features)  # (e, r, in)
        b = B.weight.view(self.out_features, -1, self.experts).permute(2, 0, 1)  # (e, out, r)
        W = a.mT @ b.mT if self.transposed else b @ a
        return W.view(getattr(self.leaf, self.weight_name).shape)


class Whole(Base):
    """Any module, as the dict of its named tensors."""

    pointwise, forwards_attributes = False, True

    def shapes_only(self) -> Base:
        return self  # its adapters are copies of the module

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def stored(self) -> Any:
        tensors = self.tensors(self.leaf)
        return next(iter(tensors.values()), torch.empty(0)), None

    @property
    def dtype(self) -> torch.dtype:
        return self.stored()[0].dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.leaf)

    def read(self) -> Any:
        with loaded(self.leaf):
            backup = self.innermost.backup
            own = self.tensors(self.leaf)
            return {n: whole(t if backup is None else backup.get(n, t)) for n, t in own.items()}, None

    def current(self) -> Any:
        with loaded(self.leaf):
            return {name: whole(tensor) for name, tensor in self.tensors(self.leaf).items()}, None

    def write(self, W: Any, b: Any = None) -> None:
        own = self.tensors(self.leaf)
        self.back_up(own)
        for name, tensor in own.items():
            put(tensor, W[name])
        self.note_written()

    def restore(self) -> None:
        if (backup := self.innermost.backup) is not None:
            for name, tensor in self.tensors(self.leaf).items():
                backup.restore(name, tensor)
        self.release()

    def stored_by_name(self) -> dict[str, Any]:
        return self.tensors(self.leaf)

    def is_stored(self, key: str) -> bool:
        return True

    def check_whole(self) -> None:
        pass  # tensors of any shape

    def fingerprints(self) -> dict[str, Any]:
        return {name: fingerprint(p) for name, p in self.leaf.named_parameters()}  # buffers may change by running

    def apply(self, x: Tensor, W: Any, b: Any = None, *args: Any, **kwargs: Any) -> Any:
        return run_with(self.module, W, (x, *args), kwargs)

    def original(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.apply(x, *self.read(), *args, **kwargs)


class Block(Whole):
    """A block of a decoder. Adapters of it are in torch's default dtype."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.get_default_dtype()


def _depth(module: Any) -> int:
    depth = 0
    while "base_layer" in module._modules:
        module, depth = module.base_layer, depth + 1
    return depth
