"""What a method's file holds: rows (cases), its formula in NumPy, its parameter shapes, its seeded faults.

The files in `methods/` are found by themselves; each has one `METHOD`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

KEY = "base_model.model."


@dataclass(frozen=True)
class Row:
    """One case to be. `id` is `<base kind>/<what is special>`; with the method's name before it, it never changes
    meaning. A row that turns out wrong is removed, and its id is not used again."""

    id: str
    base: str  # a key of bases.BASES
    config: dict  # as in adapter_config.json; peft_type is added
    profile: str = "full"  # core | full
    # integer inputs besides the model's own: name -> [shape, below], or {"values": ...}; with `labels` among them the
    # output is the loss
    inputs: dict = field(default_factory=dict)
    dtypes: tuple = ("float64", "float32", "bfloat16")
    second: dict | None = None  # the config of a second adapter, for the lifecycle trace; {} = this config
    merges: bool = True
    # "formula": the reference contradicts itself or fails here, and the paper's formula is the golden; `note` says how
    golden: str = "reference"
    draw: str = ""  # another one chooses other random numbers, where those of the first are ill-conditioned
    # what reference and formula disagree about; both answers are recorded, and either one passes
    disputed: str = ""
    note: str = ""
    # prompts that are computed from what is trained, and saved as the result: the case holds what is trained, by live
    # name, instead of what is saved. See `Prompt.live`
    live: bool = False
    begins: bool = False  # a new adapter's tensors that `Tensors.made` gives are recorded, and checked with the keys
    lost: bool = False  # the reference saves less than it trains: what there is to save follows from the closed form


@dataclass(frozen=True)
class Fault:
    """A wrong implementation: the right one with `change` made to it. `caught_by`: the checks meant to see it."""

    id: str
    what: str
    change: dict  # operation -> replacement, see drivers/oracle.py; "formula" is the usual one
    caught_by: tuple = ("forward", "merge")
    cases: tuple = ()  # the rows meant for it; empty: every row of the method
    gradient_only: bool = False  # right outputs, wrong gradients
    spares: tuple = ()  # rows that this fault cannot show in
    link: str = ""  # a real bug of this kind
    dtype: str = "float32"  # in which it shows

    def meant_for(self, row_id: str) -> bool:
        return row_id in self.cases if self.cases else row_id not in self.spares


@dataclass(frozen=True)
class Tensors:
    """What is special about an adapter's tensors."""

    # shared(config, sites) -> {whole key: shape} of tensors that belong to no single layer
    shared: Callable | None = None
    # tensors that PEFT saves but does not train (VeRA's projections), by slot or whole key
    frozen: tuple = ()
    # (field of the config, slots or whole keys): where the field is False, a checkpoint lacks these
    unsaved: tuple = ()
    exact: bool = False  # those are not rounded to 8 bits: the reference computes others from its own, not from them
    whole: tuple = ()  # slots whose numbers are whole, whatever dtype the others have
    # fixed(key, shape, config) -> True where an entry of a saved tensor is not trained though others are
    fixed: Callable | None = None
    # fresh(site, tensors, config) -> tensors that a new adapter takes from the base (DoRA's magnitude, copied rows)
    fresh: Callable | None = None
    # made(config, sites) -> {whole key: value} of the shared ones that a new adapter takes from the base, or a file
    made: Callable | None = None
    # slot (or key) -> the value that makes a fresh adapter do nothing; the others may be anything
    neutral: dict = field(default_factory=dict)
    # compact(tensors, config) -> what a checkpoint holds where the config asks for a smaller one, and expanded(that,
    # config) -> tensors that are worth the same
    compact: Callable | None = None
    expanded: Callable | None = None
    # the recorder's tensors: perturb(key, fresh value, rng) -> value; None: fresh + 0.3 normal
    perturb: Callable | None = None
    # gauges(config, paths) -> the choices that an implementation has, each {key: array}: multiplying the adapter's
    # tensors by it undoes the choice. The checks take the one that comes closest to the golden
    gauges: Callable | None = None

    def is_whole(self, key: str) -> bool:
        """Is this a tensor of whole numbers?"""
        return key.endswith(self.whole)

    def is_frozen(self, key: str) -> bool:
        """Is this saved tensor one that is not trained?"""
        return any(key == f or key.endswith("." + f) for f in self.frozen)


@dataclass(frozen=True)
class Prompt:
    """What is joined to a model's input; the output may be longer than the base model's."""

    # formula(tensors by key, config[, inputs][, held]) -> {"tokens": ..., "decoder_tokens": ...} or {"past": ...}
    formula: Callable
    # live(config) -> {live name: shape} of an adapter's parameters, and saved(tensors by live name, config) -> what a
    # checkpoint holds, where these are not the same ({} where they are)
    live: Callable | None = None
    saved: Callable | None = None
    # loss(logits, inputs, config), where it is not the model's own
    loss: Callable | None = None


@dataclass(frozen=True)
class Budget:
    """What is left of an adapter in training: ranks that shrink, subspaces that are trained no longer."""

    # allocator(config, tensors), with step(tensors, gradients, number of the step) -> tensors, and `kept`
    allocator: Callable
    # pruned(tensors, kept) -> what a checkpoint holds, where that is less than all
    pruned: Callable | None = None


@dataclass(frozen=True)
class Laws:
    """Which laws hold, and what they draw."""

    draw: dict  # config field -> values
    draw_fresh: dict = field(default_factory=dict)  # more of that for the law of fresh adapters: initialisations
    bases: tuple = ("mlp-tokens",)
    inputs: dict = field(default_factory=dict)  # as those of a row
    second: dict = field(default_factory=dict)  # config fields that a second adapter needs
    # one adapter name per sample in a batch; several active adapters; a strength that scales the delta linearly
    mixed_batch: bool = False
    stacks: bool = True
    together: bool = True  # several can be active at once, whether or not they add up
    scales: bool = False
    whole_batch: bool = False  # a sample's output depends on the other samples
    single: bool = False  # a model has one adapter of this method at most
    fresh_identity: bool = False  # a new adapter does nothing because its tensors are taken from the base
    # idle(key, config) -> True for a trained tensor that the output does not depend on
    idle: Callable | None = None


@dataclass(frozen=True)
class Method:
    name: str
    peft_type: str
    title: str
    paper: str
    equation: str
    rows: list
    # shapes(site, config) -> {slot: shape} of the tensors saved for one adapted weight, e.g. {"lora_A.weight": (r, in)}
    shapes: Callable
    laws: Laws
    # formula(site, tensors by slot, config) -> (W', b'), W as (out, in, *kernel). With a parameter `frozen` it is given
    # the site of the base model's own weight, where others may be folded into `site` already
    formula: Callable | None = None
    # run(site, tensors, config, x, inputs) -> y, where the output is no W' x + b' (routed methods)
    run: Callable | None = None
    # route(base, weights, tensors by key, config, inputs[, held]) -> {path: function(site, x) -> y}, where it takes the
    # whole model to find out what a layer does; `held`: tensors and inputs as they are where no gradient goes
    route: Callable | None = None
    prompt: Prompt | None = None
    tensors: Tensors = Tensors()
    faults: tuple = ()
    merges: bool = True
    # penalty(tensors by key, config[, base][, weights][, inputs]) -> what is added to the model's own loss
    penalty: Callable | None = None
    budget: Budget | None = None
    # files(folder): write what configs name by path, into `folder`/adapters
    files: Callable | None = None

    def live(self, config: dict) -> dict:
        """The live parameters that a checkpoint is computed from; {} where it holds them, as it does for use alone."""
        if not self.prompt or not self.prompt.live or config.get("inference_mode"):
            return {}
        return self.prompt.live(config)

    def saved(self, tensors: dict, config: dict) -> dict:
        """What a checkpoint holds of an adapter with these parameters."""
        if self.tensors.compact:
            tensors = self.tensors.compact(tensors, config)
        saved = self.prompt and self.prompt.saved
        return saved(tensors, config) if saved and self.live(config) else tensors


def turned(tensors: dict, gauge: dict) -> dict:
    """The tensors times those of a gauge; the others as they are."""
    return {k: v * gauge[k] if k in gauge else v for k, v in tensors.items()}


def slots(tensors: dict, path: str, config: dict | None = None) -> dict:
    """The tensors of the adapter on one weight: slot -> array. Shared tensors keep their whole key."""
    own = {k[len(KEY + path) + 1:]: v for k, v in tensors.items() if k.startswith(f"{KEY}{path}.")}
    return own
