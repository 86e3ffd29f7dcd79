"""What one forward pass of a model tells the layers: it belongs to that pass, and to the thread that runs it.

A pass is opened by the model and read by its layers. Gradient checkpointing runs layers once more in the backward pass,
when theirs is over and others may have come, in whatever thread autograd uses: gradients that come to a pass's output
open it again until that backward pass ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from .errors import BatchError


class Pass:
    """What one forward pass of the whole model tells every layer: who takes which sample, and what that is to him.

    A method may tell its own layers more, under names of its own.
    """

    adapter_names: Sequence[str] | None = None  # one name for each sample of the batch
    scalings: Any = None  # (batch, length, layers, adapters): weights of adapters that are mixed by token
    beams = 1  # rows that `generate` makes of one sample
    by_sample: Mapping[str, Tensor | None] = {}  # what an adapter noticed: by name, (batch, ...) or nothing
    input_length: int | None = None  # how many tokens the input of `generate` has
    generated = 0  # how many tokens later than that input the tokens of this pass end

    def __init__(self, told: dict[str, Any]):
        for name, value in told.items():
            setattr(self, name, value)

    def groups(self, size: int, names: Sequence[str] | None) -> dict[str, list[int]] | None:
        """Rows of a batch of `size` by adapter name, or None when the batch is not mixed.

        With beam search each name stands for as many rows as there are beams, except in an encoder.
        """
        names = self.adapter_names if names is None else names
        if names is None:
            return None
        if not names or size not in (len(names), len(names) * self.beams):
            raise BatchError(
                "Length of `adapter_names` should be the same as the number of inputs, "
                f"but got {len(names)} and {size} respectively."
            )
        rows: dict[str, list[int]] = {}
        for row in range(size):
            rows.setdefault(names[row * len(names) // size], []).append(row)
        return rows

    def sample_values(self, name: str, size: int) -> Tensor | None:
        """What adapter `name` noticed, for each row of a batch of `size`; each sample may stand for several rows."""
        values = self.by_sample.get(name)
        if values is None:
            return None
        if not len(values) or size % len(values):
            raise BatchError(f"The input of adapter '{name}' has {len(values)} samples, that of a layer {size}.")
        return values.repeat_interleave(size // len(values), 0)

    def of_rows(self, rows: list[int], size: int) -> dict[str, Any]:
        """What is told of each sample, for some rows of the batch of `size`."""
        if not self.by_sample:
            return {}
        every = {name: self.sample_values(name, size) for name in self.by_sample}
        return {"by_sample": {name: None if values is None else values[rows] for name, values in every.items()}}


NOTHING = Pass({})
AGAIN: dict[tuple[int, int], Pass] = {}  # what runs again, by backward pass and context; NOTHING: several passes


class Context(threading.local):
    """The passes that are open in a thread, the innermost last. A copy is made for passes of its own."""

    def __init__(self) -> None:
        self.opened = [NOTHING]

    def __reduce__(self) -> Any:
        return type(self), ()

    @property
    def now(self) -> Pass:
        """The pass that is running. A backward pass over several devices has a thread for each of them."""
        told = self.opened[-1]
        if told is NOTHING and AGAIN:
            told = AGAIN.get((torch._C._current_graph_task_id(), id(self)), told)
        return told

    def open(self, **told: Any) -> Pass:
        """Begin a pass inside the one that is running, which tells what that does but for `told`. To be closed."""
        new = Pass({**vars(self.opened[-1]), **told})
        self.opened.append(new)
        return new

    def close(self) -> None:
        """End the pass that is running."""
        if len(self.opened) > 1:
            self.opened.pop()

    @contextmanager
    def telling(self, **told: Any) -> Iterator[Pass]:
        """While it is open, passes tell this; it may be closed out of turn, and in another thread."""
        opened, new = self.opened, self.open(**told)
        try:
            yield new
        finally:
            if new in opened:
                opened.remove(new)

    def keep_for_backward(self, output: Any) -> Any:
        """The output of the pass that is running, whose layers will know of it when they run again for gradients."""
        told = self.opened[-1]
        if told is NOTHING or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return output

        @unserializable_hook
        def again(gradient: Tensor) -> None:
            if self.opened[-1] is not told:
                torch.autograd.Variable._execution_engine.queue_callback(_Again(self, told))

        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(again)
        return output


class _Again:
    """A pass that is open once more until the backward pass lets go of this object, finished or failed."""

    def __init__(self, context: Context, told: Pass):
        self.opened = context.opened
        self.told: Pass | None = told
        self.key = torch._C._current_graph_task_id(), id(context)
        self.opened.append(told)
        AGAIN[self.key] = told if AGAIN.get(self.key, told) is told else NOTHING

    def __call__(self) -> None:
        AGAIN.pop(self.key, None)
        if self.told is not None and self.told in self.opened:
            self.opened.remove(self.told)
        self.told = None

    __del__ = __call__


def _tensors(output: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in what a model returns, whatever holds them."""
    if isinstance(output, Tensor):
        yield output
    elif depth and not isinstance(output, nn.Module):
        inside = output.values() if isinstance(output, dict) else output
        inside = inside if isinstance(output, (dict, list, tuple)) else getattr(output, "__dict__", {}).values()
        for part in inside:
            yield from _tensors(part, depth - 1)
