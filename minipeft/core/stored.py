"""Tensors as a model stores them: written in place, kept while others are in their place, gathered where sharded."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 14  # words of 8 bytes that are looked at together


class Backup(nn.Module):
    """Tensors by name, any name, that go where the module goes and are not in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[str, tuple[int, int]] = {}  # of what is overwritten: autograd's counts, before and since

    def note_version(self, name: str, tensor: Tensor) -> None:
        """Note how often the overwritten tensor of that name has been written to in place."""
        if not tensor.is_inference():
            self.versions[name] = self.versions.get(name, (tensor._version,))[0], tensor._version

    def restore(self, name: str, tensor: Tensor) -> None:
        """Write the kept values where they were. Autograd's graphs from before hold again, for not a bit is other."""
        versions = None if tensor.is_inference() else self.versions.get(name)
        unseen = versions is not None and versions[1] == tensor._version  # nobody else has written meanwhile
        put(tensor, self[name])
        if versions is not None and unseen:
            set_version(tensor, versions[0])

    def add(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name.replace(".", "/"), tensor, persistent=False)

    def get(self, name: str, default: Any = None) -> Any:
        return self._buffers.get(name.replace(".", "/"), default)

    def __contains__(self, name: str) -> bool:
        return name.replace(".", "/") in self._buffers

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name.replace(".", "/")]  # type: ignore[return-value]


def own_copy(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, with which one can train also when it is made under inference_mode."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, or where that stayed behind when `other` moved, a parameter with its values there."""
    if (tensor.device, tensor.dtype) == (other.device, other.dtype):
        return tensor
    return nn.Parameter(tensor.detach().to(other.device, other.dtype), other.requires_grad)


def put(to: Any, values: Any) -> None:
    """Write values into a stored tensor, in its own memory, dtype and sharding."""
    values = values.detach()
    if sharded(to) and not sharded(values):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(to.dtype), to.device_mesh, to.placements, src_data_rank=None)
    with torch.inference_mode(to.is_inference() or torch.is_inference_mode_enabled()), torch.no_grad():
        to.copy_(values if sharded(to) else whole(values))


def set_version(tensor: Tensor, version: int) -> None:
    """Set autograd's count of the writes into a tensor."""
    as_it_is = torch.autograd._unsafe_preserve_version_counter(tensor)
    several = hasattr(as_it_is, "prev_versions")  # torch 2.5 and newer
    setattr(as_it_is, "prev_versions" if several else "prev_version", (version,) if several else version)
    as_it_is.__exit__()


def sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which each process has a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """The whole of a tensor that may be sharded: then all processes must call this together."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def memory(tensor: Tensor) -> int:
    """A number that two tensors have in common when one would be overwritten with the other."""
    return id(tensor) if sharded(tensor) or tensor.is_meta else tensor.data_ptr() or id(tensor)


def reshard(module: nn.Module) -> None:
    """Let FSDP2 hold `module` in shards again: what is written into gathered parameters is lost with them."""
    states = sys.modules.get("torch.distributed._composable_state")
    for root in list(getattr(states, "_module_state_mapping", ())):
        if hasattr(root, "reshard") and any(part is module for part in root.modules()):
            root.reshard()


@torch.no_grad()
def fingerprint(tensor: Tensor) -> tuple[torch.dtype, int] | None:
    """(dtype, a hash of the bits), the same on every device; None on the meta device.

    The words of the memory are summed, each times an odd number of its own, modulo 2^64: an edit of one is always
    noticed, of several all but certainly.
    """
    dtype, tensor = tensor.dtype, whole(tensor.detach())
    if tensor.is_meta:
        return None
    flat = tensor.contiguous().flatten().view(torch.uint8)
    if over := flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(8 - over)])
    words = (flat.clone() if flat.storage_offset() % 8 else flat).view(torch.int64)
    count, odd = len(words) // CHUNK, _odd(torch.arange(min(CHUNK, len(words)), device=words.device))
    whole_rows, rest = words[: count * CHUNK].view(count, CHUNK), words[count * CHUNK :]
    rows = whole_rows.split(1 if words.device.type == "cpu" else 256)  # on a CPU, what its cache can hold
    sums = torch.cat([*[(part * odd).sum(1) for part in rows if len(part)], (rest * odd[: len(rest)]).sum()[None]])
    return dtype, int((sums * _odd(torch.arange(len(sums), device=words.device))).sum())


def _odd(n: Tensor) -> Tensor:
    """Odd numbers without a pattern, for the numbers n (int64)."""
    n = (n + 1) * -7046029254386353131
    n = (n ^ (n >> 29)) * -4658895280553007687
    return (n ^ (n >> 32)) | 1


def users_of(modules: Iterable[nn.Module]) -> dict[int, set[nn.Module]]:
    """Which of the modules have each parameter as their own, by the parameter's memory."""
    users: dict[int, set[nn.Module]] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(memory(parameter), set()).add(module)
    return users
