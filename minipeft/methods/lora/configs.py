"""LoRA's configuration, and those of its variants: plain records, as PEFT defines them. lora.py says which are done."""

from __future__ import annotations

import dataclasses
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.config import PeftConfig, Positive, Probability, check_fields
from ...core.errors import ConfigError, PeftWarning, UnsupportedFeatureError
from .initial import INITS, changes_base


class Record:
    """A part of a LoRA configuration, whose fields are checked as those of a PeftConfig are."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Record:
        """The record for a dict read from JSON; keys that are not settable are left out."""
        known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        return cls(**{key: value for key, value in values.items() if key in known})

    def require(self, **conditions: bool) -> None:
        """Raise `ConfigError` naming the first field whose condition does not hold."""
        for name, holds in conditions.items():
            if not holds:
                raise ConfigError(f"{type(self).__name__}.{name} cannot be {getattr(self, name)!r}.")


@dataclass
class LoraRuntimeConfig(Record):
    """What only matters while running: `ephemeral_gpu_offload` initialises DoRA on the accelerator."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig(Record):
    """LoftQ, https://arxiv.org/abs/2310.08659: bits of the quantised weight, and alternating steps."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig(Record):
    """EVA, https://arxiv.org/abs/2410.07170: ranks and A from the singular vectors of activations."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(rho=self.rho >= 1.0, tau=0.0 <= self.tau <= 1.0)


@dataclass
class CordaConfig(Record):
    """CorDA, https://arxiv.org/abs/2406.05223: factors from context-oriented singular values."""

    cache_file: str | os.PathLike | None = None
    covariance_file: str | os.PathLike | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig(Record):
    """LoRA-GA, https://arxiv.org/abs/2407.05000: factors from the singular vectors of a gradient."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class VeloraConfig(Record):
    """VeLoRA, https://arxiv.org/abs/2405.17991: compressed activations for the backward pass."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self):
        super().__post_init__()
        self.require(num_groups=self.num_groups > 0, scale=self.scale > 0)


@dataclass
class MontecloraConfig(Record):
    """MonteCLoRA: a Monte Carlo estimate over perturbed factors."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self):
        super().__post_init__()
        self.require(
            num_samples=self.num_samples > 0, dirichlet_prior=self.dirichlet_prior > 0, buffer_size=self.buffer_size > 0
        )


@dataclass
class BdLoraConfig(Record):
    """Block-diagonal LoRA: which modules have a block-diagonal A, which a block-diagonal B."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self):
        super().__post_init__()
        lists = {name: getattr(self, name) for name in ("target_modules_bd_a", "target_modules_bd_b")}
        self.require(nblocks=self.nblocks > 0, **{k: not isinstance(v, str) for k, v in lists.items()})
        if both := set.intersection(*(set(v or ()) for v in lists.values())):
            raise ConfigError(f"{' and '.join(lists)} overlap: {', '.join(sorted(both))}.")


@dataclass
class ArrowConfig(Record):
    """Arrow routing, https://arxiv.org/abs/2405.11157: tokens choose among trained LoRA experts."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.require(top_k=self.top_k > 0, router_temperature=self.router_temperature > 0)


@dataclass
class KasaConfig(Record):
    """KaSA, https://arxiv.org/abs/2412.06071: weights of its two regularisers."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        self.require(beta=self.beta >= 0, gamma=self.gamma >= 0)


as_config: dict[str, type[Record]] = {  # fields of LoraConfig that may be given as a dict
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
}


@dataclass
class LoraConfig(
    PeftConfig, method="LORA", layers_need_list=True,
    optional=("loftq_config", "qalora_group_size", "runtime_config"),
):
    """Fields of LoRA and its variants. Raises `ConfigError` for values that cannot work together."""

    r: Positive = 8  # rank
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: Probability = 0.0  # on the input of A, while training
    fan_in_fan_out: bool = False  # weights stored (in, out); found out by itself
    bias: Literal["none", "all", "lora_only"] = "none"  # which of the model's own biases are trained
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True  # False: B random; or a name in lora_init.INITS
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Positive] | None = field(default_factory=dict)  # path or regular expression -> r
    alpha_pattern: dict[str, int | float] | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | dict | None = None
    corda_config: CordaConfig | dict | None = None
    lora_ga_config: LoraGAConfig | dict | None = None
    use_dora: bool = False  # see dora.py
    velora_config: VeloraConfig | dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)  # never saved
    lora_bias: bool = False  # a bias on B
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | dict | None = None
    arrow_config: ArrowConfig | dict | None = None
    kasa_config: KasaConfig | dict | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name, cls in as_config.items():
            value = getattr(self, name)
            setattr(self, name, cls.of(value) if isinstance(value, dict) else value)
        if isinstance(self.loftq_config, dict):
            LoftQConfig.of(self.loftq_config)  # it stays a dict, of values that are right
        if isinstance(how := self.init_lora_weights, str):
            if not INITS.fullmatch(how.lower()):
                raise ConfigError(f"Unknown initialization init_lora_weights={how!r}.")
            self.init_lora_weights = how.lower()  # PEFT takes "OLoRA" and "Gaussian", too
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and changes_base(self.init_lora_weights):
            way = "`save_pretrained` cannot make a plain LoRA of it (`path_initial_model_for_weight_conversion`)"
            warnings.warn(f"init_lora_weights={how!r} with rsLoRA and patterns: {way}.", PeftWarning)
        if self.init_lora_weights == "eva" and self.eva_config is None:
            self.eva_config = EvaConfig()
        if self.init_lora_weights == "corda" and self.corda_config is None:
            self.corda_config = CordaConfig()
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        if self.lora_bias and (isinstance(self.init_lora_weights, str) or self.use_dora):
            raise ConfigError("`lora_bias=True` needs init_lora_weights=True or False, and use_dora=False.")

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        del fields["runtime_config"]
        return fields

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Not as in PEFT: a kind of layer is known to all methods. Raises `UnsupportedFeatureError`."""
        raise UnsupportedFeatureError(
            "A kind of layer of one's own is a Base that names the layer's class, and then every method adapts it: "
            "`class MyBase(Linear, layer=MyLayer)`; see docs/own_method.md."
        )
