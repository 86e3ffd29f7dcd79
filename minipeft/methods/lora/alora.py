"""aLoRA - Activated LoRA: Fine-tuned LLMs for Intrinsics. Greenewald et al., 2025, https://arxiv.org/abs/2504.12397.

    y_t = W x_t + b + s B A x_t   for tokens t from the invocation sequence on, generated ones too; A, B, s as in LoRA
    y_t = W x_t + b               for those before it
    parameters                    r (in + out), or r (in + out) + out with lora_bias=True

The sequence is `alora_invocation_tokens`. In each sample its last occurrence counts; a sample without it runs on the
frozen model. What a cache holds of the tokens before it is the frozen model's, whatever adapter comes next.

`alora_offsets`, one for each sample, takes the place of searching in `input_ids`: the number of tokens from the first
of the sequence to the end of the input, or None for a sample without it. Unless `task_type` is CAUSAL_LM nothing is
searched for.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapter import Routed, unsupported
from ...core.config import TaskType
from ...core.errors import BatchError, PeftWarning, UnsupportedFeatureError
from .initial import changes_base
from .lora import Factors, LoraConfig

NEVER = 2**62  # beyond every token


class ALoRA(Factors, Routed, config=LoraConfig, variant="alora_invocation_tokens"):
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    inputs = ("alora_offsets",)

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> Any:
        if config.task_type != TaskType.CAUSAL_LM:
            warnings.warn(
                "aLoRA is for task_type CAUSAL_LM: with any other, it only runs where `alora_offsets` are given.",
                PeftWarning,
                stacklevel=2,
            )
        return super().prepare(config, model)

    @classmethod
    def check_layer(cls, config: Any, path: str, base: Any) -> None:
        if base.needs_weights:
            raise unsupported(cls, base.leaf, path)

    @classmethod
    def changes_base(cls, config: Any) -> bool:
        return changes_base(config.init_lora_weights)

    @classmethod
    def per_sample(cls, config: Any, inputs: dict[str, Any]) -> Tensor | None:
        """Where it begins in each sample, counted from the end of the input: (batch,), below 0 or NEVER."""
        offsets, ids = inputs.get("alora_offsets"), inputs.get("input_ids", inputs.get("inputs"))
        if offsets is not None:
            if any(o is not None and o < 0 for o in offsets):
                raise BatchError(f"`alora_offsets` must be None or at least 0 for each sample, got {offsets}.")
            return torch.tensor([-int(o) if o else NEVER for o in offsets])  # (batch,)
        if config.task_type != TaskType.CAUSAL_LM:
            return None
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            return starts(torch.atleast_2d(ids), torch.tensor(config.alora_invocation_tokens, device=ids.device))
        warnings.warn(
            "Without `input_ids` aLoRA cannot look for its invocation sequence, and is off in this pass. Give "
            "`alora_offsets`.",
            PeftWarning,
            stacklevel=2,
        )
        return None

    @property
    def sums(self) -> tuple[int, ...] | None:
        return tuple(self.config.alora_invocation_tokens)

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (batch, length, out) or (batch, out)
        on = self.invoked(y)  # (batch, length) or (batch,)
        # also where nothing is on, for then the gradients of A and B are zero and not lacking
        d = self.scaling * self.base.low_rank_forward(self.dropped(x[on]), self.lora_A, self.lora_B)  # (tokens, out)
        return y.index_put((on,), (y[on] + d).to(y.dtype))

    def invoked(self, y: Tensor) -> Tensor:
        """Which tokens of y it acts on. PEFT: generating without a cache, or in chunks, counts from the wrong end."""
        now = self.layer.context.now
        if self.name not in now.by_sample and torch._C._current_graph_task_id() != -1:
            why = "gradients must come from what the model returned"
            raise UnsupportedFeatureError(f"aLoRA cannot run '{self.path}' again for gradient checkpointing: {why}.")
        start, length = now.sample_values(self.name, len(y)), y.shape[1] if y.dim() > 2 else 1
        if start is None:
            on = torch.zeros(len(y), length, dtype=torch.bool, device=y.device)
        else:
            on = torch.arange(now.generated - length, now.generated, device=y.device) >= start.to(y.device)[:, None]
        return on if y.dim() > 2 else on.squeeze(1)


def starts(ids: Tensor, tokens: Tensor) -> Tensor:
    """Where `tokens` (n,) begin for the last time in each row of `ids` (batch, length), from its end; or NEVER."""
    length, n = ids.shape[1], len(tokens)
    if length < n:
        return torch.full((len(ids),), NEVER, device=ids.device)
    hits = (ids.unfold(1, n, 1) == tokens).all(-1)  # (batch, length - n + 1)
    last = torch.arange(-length, 1 - n, device=ids.device).where(hits, -NEVER).amax(1)
    return last.where(last > -NEVER, NEVER)
