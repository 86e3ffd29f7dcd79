"""Trains a LoRA on two processes and saves it: `python distributed.py LIBRARY FOLDER WAY...`: ddp, fsdp2, accelerate.

Writes losses.json and the adapter into FOLDER/WAY. With `one` as a way to distribute, there is one process.
"""

import importlib
import json
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

STEPS, BATCH = 4, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(13, 16)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 13)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base():
    torch.manual_seed(0)
    return Net()


def adapted(lib):
    torch.manual_seed(1)
    fields = {"target_modules": ["words", "up", "down"], "modules_to_save": ["head"], "init_lora_weights": False}
    return lib.get_peft_model(base(), lib.LoraConfig(r=4, **fields))


def batches():
    return torch.randint(13, (STEPS, BATCH, 5), generator=torch.Generator().manual_seed(2))


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(rank, world, lib, way, folder):
    torch.set_num_threads(1)
    lib, model, accelerator = importlib.import_module(lib), None, None
    if way == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
    elif world > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=world, rank=rank)
    model = whole = adapted(lib)
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(whole)
    if way == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for block in whole.base_model.model.blocks:
            fully_shard(block, mesh=mesh)
        model = fully_shard(whole, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if accelerator:
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for ids in batches():
        optimizer.zero_grad()
        loss = loss_of(model, ids[rank::world])
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    state = None
    if way == "fsdp2":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if way == "fsdp2" and rank == 0:
        try:
            whole.save_pretrained(Path(folder, "without"))
        except ValueError as error:
            assert "state_dict" in str(error) and not list(Path(folder, "without").iterdir())
        else:
            raise AssertionError("a shard was saved as if it were the whole")
    if rank == 0:
        (accelerator.unwrap_model(model) if accelerator else whole).save_pretrained(folder, state_dict=state)
        Path(folder, "losses.json").write_text(json.dumps(losses))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def process(rank, port, lib, way, folder):
    if way == "one":
        return train(0, 1, lib, way, folder)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    train(rank, 2, lib, way, folder)


if __name__ == "__main__":
    lib, folder, *ways = sys.argv[1:]
    importlib.import_module(lib), importlib.import_module("accelerate")  # once, for all processes
    for way in ways:
        Path(folder, way).mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments, count = (port, lib, way, str(Path(folder, way))), 1 if way == "one" else 2
        torch.multiprocessing.start_processes(process, arguments, nprocs=count, start_method="fork")
