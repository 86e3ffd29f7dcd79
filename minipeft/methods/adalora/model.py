"""What a model with AdaLoRA adapters can do: the regularisation, and pruning while it trains.

    loss + c mean(|A A^T - I|, |B^T B - I|)        over all A and B, in the Frobenius norm
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from ...core.config import PeftConfig
from ...core.errors import PeftError
from ...core.layer import adapter_parts, layers
from ...core.offload import onload
from ...maths.rotations import from_orthonormal
from ...model.tuner import BaseTuner
from .adalora import AdaLoRA
from .budget import RankAllocator


class AdaLoraModel(BaseTuner, method="ADALORA"):
    """A model with AdaLoRA adapters. When the model's output has a `loss`, the regularisation is added to it.

    Call `update_and_allocate` in every training step; a model that gives no `loss` takes the regularisation from
    `orthogonal_regularization`.
    """

    def add(self, name: str, config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
        report = super().add(name, config, *args, **kwargs)
        if not config.inference_mode:
            self.rankallocator = RankAllocator(self.model, config, name)
        return report

    @property
    def trainable_adapter_name(self) -> str | None:
        """The adapter that is not in inference mode."""
        return next((name for name, config in self.peft_config.items() if not config.inference_mode), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), Tensor) and self.trainable_adapter_name is not None:
            outputs.loss = outputs.loss + self.orthogonal_regularization().to(outputs.loss.dtype)
        return outputs

    def orthogonal_regularization(self) -> Tensor:
        """c mean(|A A^T - I|, |B^T B - I|) of the trained adapter, a scalar to be added to the loss."""
        name = self._trained()
        found = [layer.adapters.get(name) for layer in layers(self.model)]
        adapters = [adapter for adapter in found if isinstance(adapter, AdaLoRA)]  # trained tokens are others
        with onload(*adapter_parts(self.model)):
            norms = [from_orthonormal(factor) for a in adapters for factor in (a.lora_A, a.lora_B.mT)]
        return cast(Any, self.peft_config[name]).orth_reg_weight * sum(norms) / len(norms)

    def update_and_allocate(self, global_step: int) -> None:
        """Note how much each entry of E matters, and prune when it is time.

        To be called in every step, after `backward()` and before the gradients are set to zero, with the number of the
        step from 0. Raises `PeftError` when no adapter is trained, or when there are no gradients.
        """
        config: Any = self.peft_config[self._trained()]
        last = config.total_step - config.tfinal
        if global_step > last:
            self.rankallocator.mask_using_rank_pattern(config.rank_pattern)
            return
        _, pattern = self.rankallocator.update_and_allocate(global_step, force_mask=global_step == last)
        if pattern is not None:
            config.rank_pattern = pattern
        if global_step == last:
            self.rankallocator.reset_ipt()

    def _trained(self) -> str:
        if self.trainable_adapter_name is None:
            raise PeftError("No AdaLoRA adapter of this model is trained: all have inference_mode=True.")
        return self.trainable_adapter_name
