"""What the book's experiments give, kept in one place: every method trained on the digits and on sentences."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import minipeft
from examples import digits
from minipeft.core.adapter import adapter_class


@dataclass
class Trained:
    """One method after training."""

    name: str
    module: str  # its method's file
    network: str
    config: str  # the class of its configuration
    options: dict[str, Any]
    parameters: int
    before: float
    after: float
    merged: bool | None
    step: float  # seconds of a processor
    memory: int  # bytes held for the backward pass, gradients and the optimizer
    layer: str = ""  # the layer that it changed most
    W: np.ndarray | None = None  # its frozen weight (out, in), and the merged one
    merged_W: np.ndarray | None = None
    tensor: str = ""  # where there is no merged weight: the largest trained tensor
    T: np.ndarray | None = None


def file_of(config: Any) -> str:
    """The module of the method that a configuration means."""
    cls = adapter_class(config)
    return (type(config) if cls.__module__ == "minipeft.core.adapter" else cls).__module__


def held(loss: Any, model: nn.Module) -> int:
    """Bytes that a training step holds beside the weights: what `loss()` keeps for its backward pass, and per trained
    parameter a gradient and Adam's two means."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(seen.values()) + 3 * trained


def matrix(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as something to look at: two dimensions, the first one kept."""
    t = tensor.detach().float()
    return (t.flatten(1) if t.dim() > 1 else t[None]).numpy()


def most_changed(before: nn.Module, after: nn.Module) -> tuple[str, np.ndarray, np.ndarray]:
    """The weight that differs most, relative to its size, by more than rounding; a matrix before a vector."""
    old = dict(before.named_parameters())
    found = [(min(p.dim(), 2), ((p - old[n]).norm() / old[n].norm()).item(), n) for n, p in after.named_parameters()]
    name = max(entry for entry in found if entry[1] > 1e-5)[2]
    return name, matrix(old[name]), matrix(dict(after.named_parameters())[name])


def train(method: digits.Method, network: nn.Module, data: digits.Data) -> Trained:
    """One method of examples/digits.py on one of its networks, and the weight that it changed most."""
    row, model = trained(method, network, data, digits.accuracy(digits.answers(network, data), data))
    if method.merges:
        after, merged = digits.answers(model, data, method), model.merge_and_unload()
        row.merged = digits.same(after, digits.answers(merged, data))
        row.layer, row.W, row.merged_W = most_changed(network, merged)
    else:
        name, tensor = max(((n, p) for n, p in model.named_parameters() if p.requires_grad),
                           key=lambda pair: pair[1].numel())
        row.tensor, row.T = name, matrix(tensor)
    return row


def trained(method: digits.Method, network: nn.Module, data: digits.Data, before: float) -> tuple[Trained, Any]:
    """What came of one method, and the model; `before` is the network's own accuracy."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        model, step = digits.adapted(minipeft, method, network, data, folder)
        after = digits.accuracy(digits.answers(model, data, method), data)
        x, labels = (part[:data.batch] for part in data.train)
        model.train()
        memory = held(lambda: data.loss(model, x, labels, method), model)
        model.eval()
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Trained(method.name, file_of(model.active_peft_config), method.network, method.config, method.options,
                       size, before, after, None, step, memory), model


def everything() -> dict[str, Any]:
    """All rows of both experiments, and the numbers that a text about them needs."""
    from . import texts

    torch.set_num_threads(1)
    networks = digits.load()
    network, _, new = networks["Reader"]
    encoders, said = texts.load()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(train, m, networks[m.network][0], networks[m.network][2]) for m in digits.METHODS]
        told = [pool.submit(texts.adapted, m) for m in texts.methods()]
        for number, job in enumerate(as_completed([*jobs, *told]), 1):
            row = job.result()
            print(f"{number}/{len(jobs) + len(told)}: {row.name}, {row.network} {row.after:.1%}", flush=True)
    full = copy.deepcopy(network)
    step = digits.train(full, new, 1e-2)
    return {
        "digits": {
            "rows": [job.result() for job in jobs],
            "all": {"parameters": sum(p.numel() for p in full.parameters()), "step": step,
                    "after": digits.accuracy(digits.answers(full, new), new)},
            "images": (len(new.train[1]), len(new.test[1])), "steps": digits.STEPS,
        },
        "texts": {
            "rows": [job.result() for job in told], "left_out": texts.DECODERS,
            "sentences": (len(said.train[1]), len(said.test[1])), "libraries": list(texts.LIBRARIES),
            "steps": texts.STEPS, "batch": said.batch, "before": texts.before("MiniLM"),
            "parameters": sum(p.numel() for p in encoders["MiniLM"].parameters()),
        },
    }
