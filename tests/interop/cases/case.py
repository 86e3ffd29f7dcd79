"""What one row of the table says."""

from dataclasses import dataclass, field

from ..bases import Base


@dataclass(frozen=True)
class Case:
    """One adapter configuration on one base model.

    `id` is `method/base/variant` and never changes meaning. The flags say what peft itself does with the case, found by
    running it; where peft breaks its own law, the property stands in `disputed` (property -> evidence in words), and
    then the law is asserted of the module under test and of it alone. The properties that may be disputed:

    fresh       a new adapter leaves the output unchanged
    outputs     the output with every trainable tensor moved
    gradients   and its gradients
    merge       the merged weights
    disabled    the output with the adapter disabled
    restore     unload() gives back the base model's weights
    reload      the output after loading the saved adapter into a new base model
    running writes   running leaves every tensor as it is
    several     the output with two adapters active
    low memory  loading with low_cpu_mem_usage
    moved       an adapter that is not active goes along when the model changes its dtype or device
    """

    id: str
    config: str  # name of the config class
    kwargs: dict
    base: Base
    fresh: bool = True  # a new adapter is the identity by construction
    exact_init: bool = True  # initial values are equal bit for bit at equal seed; else to rounding (SVD, QR)
    merges: bool = True
    stacks: bool = True  # peft runs two active adapters
    second: dict | None = field(default_factory=dict)  # changes to kwargs for a second adapter; None: peft refuses one
    mixed: bool | None = False  # peft takes adapter_names=[...] for it; None: not asked for
    train: bool = False  # random while training: also compared in train mode at equal seed
    scale: float = 0.1  # how far a trainable tensor is moved
    own_buffers: bool = False  # buffers (none of them saved) are not peft's: plain tensors here or there
    own_loss: bool = False  # adds a term to the loss, which no merged weight can carry
    tolerance: float | None = None  # in place of the usual one in float64
    inputs: dict = field(default_factory=dict)  # further forward arguments, such as task_ids
    disputed: dict[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.id.split("/")[0]

    @property
    def prompt(self) -> bool:
        return self.config in PROMPTS


PROMPTS = {"PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "MultitaskPromptTuningConfig",
           "CPTConfig", "CartridgeConfig"}


def trained_bias() -> dict:
    """What all methods with a `bias` option share: flags of a row that sets it."""
    return {
        "second": None,
        "disputed": {
            "disabled": "the base model's own biases are trained, and disabling the adapter leaves them changed",
            "restore": "unload() returns a base model with the trained biases",
        },
    }


def rows(method: str, config: str, **defaults):
    """A function that makes rows of one method: row(id, base, **flags of Case and fields of the config)."""

    def row(id: str, base: Base, **given) -> Case:
        given = {**defaults, **given}
        flags = {k: given.pop(k) for k in list(given) if k in Case.__dataclass_fields__}
        return Case(f"{method}/{id}", config, given, base, **flags)

    return row


@dataclass(frozen=True)
class Refused:
    """What peft 0.21.2 refuses: the step at which, and the error it raises."""

    id: str
    config: str
    kwargs: dict
    base: Base
    step: str  # "inject", "run", "merge", "mixed" or "second"
    error: str
    inputs: dict = field(default_factory=dict)
