"""Arrow - Towards Modular LLMs by Building and Reusing a Library of LoRAs. Ostapenko et al., 2024,
https://arxiv.org/abs/2405.11157, sec. 4.2; with `use_gks` GenKnowSub, Bagherifard et al., 2025,
https://aclanthology.org/2025.acl-short.54.

    y = W x + b + sum_e c_e s_e B_e A_e x    A_e: (r_e, in), B_e: (out, r_e): the other LoRA adapters of the layer
    c = softmax(|P x| / T)                   over the top_k largest |P x| of each token, 0 for the others: (experts,)
    P_e = the v that maximises |B_e A_e v|   of length 1, after 15 steps of power iteration: P: (experts, in)
    parameters    r (in + out)

Those parameters are PEFT's: the router has factors of its own, which are saved and never used. Experts are all adapters
of the layer but routers and general experts, those named gks_0, gks_1, ... With `use_gks` the means of the general A
and of the general B are taken off A_e and B_e first. A layer without experts is left as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Routed, unsupported
from ...core.errors import AdapterNameError, ConfigError, ConfigTypeError, UnsupportedFeatureError
from ...core.layer import layers
from .configs import ArrowConfig
from .lora import Factors, LoRA, LoraConfig

if TYPE_CHECKING:
    from ...model.peft_model import PeftModel

STEPS, EPSILON = 15, 1e-8  # of the power iteration


class Arrow(Factors, Routed, config=LoraConfig, variant="arrow_config"):
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    computed: tuple[Any, Any, Any] = None, (), None  # the last prototypes, with the names and factors they are of
    starts: Mapping[str, Tensor] = {}  # by expert: so that without a seed, too, each is drawn only once

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> Any:
        init = config.init_lora_weights
        if isinstance(init, str) and init != "gaussian":
            raise ConfigError(f"An Arrow router does not use its factors; leave out init_lora_weights={init!r}.")
        return super().prepare(config, model)

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Any) -> None:
        if base.needs_weights:
            raise unsupported(cls, base.leaf, path)

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (..., out)
        tasks, general = self.experts()
        if not tasks:
            return y
        k, T = self.config.arrow_config.top_k, self.config.arrow_config.router_temperature
        if k > len(tasks):
            raise ConfigError(f"Arrow takes top_k={k} experts, but '{self.path}' has {len(tasks)}.")
        As, Bs = self.purified(tasks, general)
        x = self.cast(x, As[0])
        score = (x @ self.prototypes(tasks, general).t()).abs()  # (..., experts)
        best, index = score.topk(k)
        c = (torch.full_like(score, -torch.inf).scatter(-1, index, best) / T).softmax(-1)
        c = c * c.new_tensor([expert.scaling for expert in tasks])
        h = torch.cat([c[..., e, None] * F.linear(x, A) for e, A in enumerate(As)], -1)  # (..., sum of r_e)
        return (y + self.lora_dropout(F.linear(h, torch.cat(Bs, 1)))).to(y.dtype)

    def experts(self) -> tuple[list[LoRA], list[LoRA]]:
        """The adapters of this layer that are chosen from, and the general ones that are subtracted from them."""
        c = self.config.arrow_config
        found = {name: plain(a) for name, a in self.layer.adapters.items() if not isinstance(a, Arrow)}
        general = c.gks_adapter_names or [name for name in found if re.fullmatch(r"gks_\d+", name)]
        tasks = [expert for name, expert in found.items() if name not in general]
        if not (c.use_gks and tasks):
            return tasks, []
        for name in general or ["gks_0"]:
            if name not in found:
                raise AdapterNameError(f"`use_gks` needs the general expert '{name}', which '{self.path}' lacks.")
        return tasks, [found[name] for name in general]

    def purified(self, tasks: list[LoRA], general: list[LoRA]) -> tuple[list[Tensor], list[Tensor]]:
        """All A_e (r_e, in) and all B_e (out, r_e), without what the general experts know."""
        As, Bs = factors(tasks)
        if not general:
            return As, Bs
        if len(ranks := {expert.r for expert in tasks + general}) > 1:
            raise ConfigError(f"`use_gks` needs experts of one rank, but on '{self.path}' they have {sorted(ranks)}.")
        # PEFT: subtracts in place in the first run, and so changes what an expert alone computes, and its checkpoint
        A0, B0 = (torch.stack(fs).detach().mean(0) for fs in factors(general))
        return [A - A0 for A in As], [B - B0 for B in Bs]

    def prototypes(self, tasks: list[LoRA], general: list[LoRA]) -> Tensor:
        """P (experts, in), computed anew when an expert came, went or changed. PEFT: not when it changed."""
        weights = [f for fs in factors(tasks + general) for f in fs]
        names = [expert.name for expert in tasks + general]
        known, of, P = self.computed
        if known != names or not all(map(same, of, weights)):
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
                of = [f.clone() for f in weights]  # also changes that torch does not see are seen by their values
                P = torch.stack([self.direction(*AB) for AB in zip(names, *self.purified(tasks, general))])
            self.computed = names, of, P
        return P

    def direction(self, name: str, A: Tensor, B: Tensor) -> Tensor:
        """The right singular vector (in,) of B A with the largest singular value, in float32 and then as A."""
        if name not in self.starts:
            seed = self.config.arrow_config.rng_seed
            generator = None if seed is None else torch.Generator(A.device).manual_seed(seed)
            start = torch.randn(A.shape[1], device=A.device, generator=generator)
            self.starts = {**self.starts, name: start}
        v, dtype = self.starts[name].to(A.device), A.dtype
        v = v / (v.norm() + EPSILON)
        A, B = A.float(), B.float()
        C = B.t() @ B  # (r, r)
        for _ in range(STEPS):
            v = A.t() @ (C @ (A @ v))
            v = v / (v.norm() + EPSILON)
        return v.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def plain(expert: Any) -> LoRA:
    """`expert`, which must be LoRA itself. PEFT: runs all others as if they were."""
    if type(expert) is not LoRA or expert.lora_bias:
        kind = "LoRA with `lora_bias`" if type(expert) is LoRA else type(expert).__name__
        raise UnsupportedFeatureError(
            f"Arrow chooses among plain LoRA experts, but '{expert.name}' on '{expert.path}' is {kind}."
        )
    return expert


def factors(experts: list[LoRA]) -> tuple[list[Tensor], list[Tensor]]:
    return [e.lora_A.weight for e in experts], [e.lora_B.weight for e in experts]


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """`base_model` with saved LoRA adapters, named task_0, task_1, ..., and an active Arrow router, "arrow_router".

    A path is a folder, or a hub id that a subfolder may follow. With `arrow_config.use_gks` the adapters at
    `general_adapter_paths` are added as gks_0, gks_1, ... The names go into `arrow_config`. `adapter_kwargs` are for
    `PeftModel.from_pretrained` and `load_adapter`.

    Raises `ConfigError` when the adapters differ in ranks or target modules or `top_k` is above their number,
    `UnsupportedLayerError` when they adapt other layers than linear ones, `UnsupportedFeatureError` when one is not
    plain LoRA, and `CheckpointError` when one cannot be loaded; `base_model` is then as it was.
    """
    from ...model.peft_model import PeftModel

    if not isinstance(arrow_config, ArrowConfig):
        raise ConfigTypeError(f"`arrow_config` must be an ArrowConfig, got {type(arrow_config).__name__}.")
    general_adapter_paths = general_adapter_paths if arrow_config.use_gks else []
    if isinstance(task_specific_adapter_paths, str) or not task_specific_adapter_paths:
        raise ConfigError("`task_specific_adapter_paths` must be a list of at least one saved adapter.")
    if arrow_config.use_gks and (isinstance(general_adapter_paths, str) or not general_adapter_paths):
        raise ConfigError("`use_gks` needs `general_adapter_paths`, a list of at least one saved adapter.")
    if arrow_config.top_k > len(task_specific_adapter_paths):
        raise ConfigError(f"top_k={arrow_config.top_k} is above {len(task_specific_adapter_paths)}, all experts.")
    tasks = {f"task_{i}": place(path) for i, path in enumerate(task_specific_adapter_paths)}
    general = {f"gks_{i}": place(path) for i, path in enumerate(general_adapter_paths or ())}
    frozen = [(p, p.requires_grad) for p in base_model.parameters()]
    modes = [(m, m.training) for m in base_model.modules()]
    names = arrow_config.task_adapter_names, arrow_config.gks_adapter_names
    model = PeftModel.from_pretrained(base_model, adapter_name="task_0", **{**tasks["task_0"], **adapter_kwargs})
    try:
        for name, where in list({**tasks, **general}.items())[1:]:
            model.load_adapter(adapter_name=name, **{**where, **adapter_kwargs})
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(tasks), list(general)
        targets, r = agreed(model, [*tasks, *general])
        model.add_adapter("arrow_router", LoraConfig(r=r, target_modules=targets, arrow_config=arrow_config))
        model.set_adapter("arrow_router")
    except Exception:
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = names
        model.unload()
        for parameter, trained in frozen:
            parameter.requires_grad_(trained)
        for module, mode in modes:
            module.training = mode
        raise
    return model


def place(path: str | os.PathLike) -> dict[str, Any]:
    """Where the adapter at `path` is, as `from_pretrained` takes it: "user/repo/a/b" is the folder a/b of a hub id."""
    parts = os.fspath(path).strip("/").split("/")
    if len(parts) < 3 or os.path.isdir(path) or os.path.isabs(path):
        return {"model_id": path}
    return {"model_id": "/".join(parts[:2]), "subfolder": "/".join(parts[2:])}


def agreed(model: nn.Module, names: list[str]) -> tuple[list[str], int]:
    """The target modules, by the last part of their paths, and the rank that all experts have in common."""
    found: dict[str, set[str]] = {name: set() for name in names}
    for layer in layers(model):
        own = [plain(layer.adapters[name]) for name in names if name in layer.adapters]
        for expert in own:
            found[expert.name].add(expert.path.rpartition(".")[2])
            if (r := own[0].r) != expert.r:
                one = f"'{expert.name}' has rank {expert.r} on '{expert.path}'"
                raise ConfigError(f"All experts must have one rank, but {one}, and '{own[0].name}' has {r}.")
    for name in names:
        if found[name] != found[names[0]]:
            both = f"'{name}' targets {sorted(found[name])}, and '{names[0]}' {sorted(found[names[0]])}"
            raise ConfigError(f"All experts must have the same target modules, but {both}.")
    return sorted(found[names[0]]), r
