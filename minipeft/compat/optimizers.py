"""Optimizers for LoRA: LoRA+, LoRA-FA and Riemannian preconditioning.

LoRA+        eta_B = ratio eta_A                 Hayou et al., 2024, https://arxiv.org/abs/2402.12354
LoRA-FA      A stays, g_B <- g_B (A A^T)^-1 / s^2    Zhang et al., 2023, https://arxiv.org/abs/2308.03303
Riemannian   g_A <- (B^T B + c I)^-1 g_A         Zhang and Pilanci, 2024, https://arxiv.org/abs/2402.02347
             g_B <- g_B (A A^T + c I)^-1
                                                 A: (r, in), B: (out, r), s: the scaling
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.bases import Embedding
from ..core.config import PeftType
from ..core.errors import ConfigError, UnsupportedFeatureError
from ..core.layer import Layer


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: Any, *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An `optimizer_cls` whose learning rate for B is `loraplus_lr_ratio` times that for A, which is `lr`.

    Trained biases and other vectors learn at the rate of B. Further options: `loraplus_lr_embedding` (1e-6) for the
    factors on embeddings, `loraplus_weight_decay` (0; never on biases and layer norms); all others are the optimizer's.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    rates = {"A": lr, "embedding": kwargs.pop("loraplus_lr_embedding", 1e-6)}
    rates["B"] = rates["B, no decay"] = lr * loraplus_lr_ratio
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("A", "embedding", "B", "B, no decay")}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, holder = modules[name.rpartition(".")[0]], modules.get(".".join(name.split(".")[:-2]))
        if isinstance(holder, Layer) and holder.method == PeftType.LORA and isinstance(holder.base, Embedding):
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.dim() == 1:
            plain = "bias" in name or isinstance(owner, nn.LayerNorm)
            groups["B, no decay" if plain else "B"].append(parameter)
        else:
            groups["A"].append(parameter)
    optimizer = optimizer_cls(
        [
            {"params": params, "weight_decay": 0.0 if name == "B, no decay" else decay, "lr": rates[name]}
            for name, params in groups.items()
        ],
        lr=lr,
        **kwargs,
    )
    if optimizer_cls.__name__ in ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"):
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in modules.values():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


class LoraFAOptimizer(Optimizer):
    """AdamW, with weight decay after the step, on gradients of B that are multiplied by (A A^T)^-1 / s^2.

    `pairs` gives the frozen A (r, in) and the scaling s of those parameters that are a B; all others are left alone.
    Raises `ValueError` for rates and decays out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        pairs: dict[nn.Parameter, tuple[Tensor, float]] | None = None,
    ):
        for name, value, top in (("lr", lr, math.inf), ("beta", betas[0], 1), ("beta", betas[1], 1), ("eps", eps, 1)):
            if not 0 <= value < top:
                raise ConfigError(f"Invalid {name}: {value}; it should be at least 0 and below {top}.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self.pairs = dict(pairs or {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what `closure`, which computes the gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                g, state = w.grad, self.state[w]
                if w in self.pairs:
                    A, s = self.pairs[w]
                    g = (g.flatten(1) @ _inverse(A.flatten(1), 1e-8).to(g) / s**2).view_as(w)
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                size = group["lr"]
                if group["correct_bias"]:
                    size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                w.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
                w.mul_(1 - group["lr"] * group["weight_decay"])
        return loss


def create_lorafa_optimizer(
    model: Any, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoraFAOptimizer:
    """Freeze every A of `model` and return an optimizer for all that is trained then; see `LoraFAOptimizer`.

    `r`, `lora_alpha` and `use_rslora` are PEFT's and not needed: each layer knows its scaling. Raises `ConfigError`
    when `use_rslora` contradicts the active adapters.
    """
    if use_rslora is not None:
        warnings.warn("`use_rslora` is deprecated here: LoraConfig says it.", FutureWarning)
        if wrong := [n for n in model.active_adapters if bool(model.peft_config[n].use_rslora) != use_rslora]:
            raise ConfigError(f"`use_rslora={use_rslora}` was passed, but the configuration of {wrong} says otherwise.")
    pairs = {}
    for layer in model.modules():
        for A_slot in ("lora_A", "lora_embedding_A") if isinstance(layer, Layer) and layer.method == "LORA" else ():
            for name, factor in (layer.contents(A_slot) or {}).items():
                A, B = (getattr(f, "weight", f) for f in (factor, layer.take(A_slot[:-1] + "B", name)))
                A.requires_grad_(False)
                if B.flatten(1).shape[1] == len(A):  # not on a grouped convolution, where B is (out, r / groups)
                    pairs[B] = A, float(layer.scaling[name])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scalings = [pairs[p][1] if p in pairs else None for _, p in named]
    group = {"params": [p for _, p in named], "names": [name for name, _ in named], "scaling_factors": scalings}
    return LoraFAOptimizer([{**group, "weight_decay": weight_decay}], lr=lr, pairs=pairs)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: Any, *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An `optimizer_cls` that preconditions the gradients of A and B on linear layers before each step.

    `reg` is c. Raises `PeftError` when nothing on the model is LoRA, or for an optimizer that must have a closure.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UnsupportedFeatureError(f"{optimizer_cls.__name__} needs a closure, which computes the gradients anew.")
    named = dict(model.named_parameters())
    found = [(A, named[name.replace(".lora_A.", ".lora_B.")]) for name, A in named.items() if ".lora_A." in name]
    pairs = [(A, B) for A, B in found if A.requires_grad and B.requires_grad and A.dim() == 2]
    if not pairs:
        raise UnsupportedFeatureError("The model has no trainable lora_A and lora_B to precondition.")

    class Riemannian(optimizer_cls):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if closure is not None:
                raise UnsupportedFeatureError("A closure would compute the gradients anew, without preconditioning.")
            for A, B in pairs:
                if A.grad is not None:
                    P = _inverse(B.mT, reg)  # (r, r)
                    A.grad.copy_(P @ A.grad.to(P))
                if B.grad is not None:
                    P = _inverse(A, reg)
                    B.grad.copy_(B.grad.to(P) @ P)
            return super().step()

    return Riemannian([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)


def _inverse(M: Tensor, reg: float) -> Tensor:
    """(M M^T + reg I)^-1, (r, r), for M (r, n), in at least float32."""
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    return torch.linalg.pinv(M @ M.mT + reg * torch.eye(len(M), dtype=M.dtype, device=M.device))
