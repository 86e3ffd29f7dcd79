"""Two processes, a model sharded by FSDP2 over both, merged and unmerged. Prints what is wrong, as JSON.

Arguments: ids of cases; those that begin with + are tried in all ways, the others in one.
"""

import copy
import faulthandler
import json
import os
import socket
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import minipeft
from minipeft.core.errors import MergeError
from tests.interop import harness as H
from tests.interop.cases import CASES

HOW = ("before a forward", "after a forward", "in parts, after a forward", "merged first")


def whole(model):
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.clone() for name, tensor in found.items()}


def frozen(state):
    return {k: t for k, t in state.items() if ".default" not in k}


def differs(got, want, tolerance):
    try:
        H.close(got, want, tolerance) if tolerance else H.identical(got, want)
    except AssertionError as error:
        return [str(error)]
    return []


def shard(model, parts):
    """FSDP2 around the model, with `parts` also around each of its parts; torch refuses parts that share tensors."""
    shared = len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False)))
    for part in list(model.base_model.model.children()) if parts and not shared else ():
        if not isinstance(part, torch.nn.ModuleList):
            fully_shard(part)
    return fully_shard(model)


def check(case, how):
    """What is wrong with the case, a list of sentences."""
    alone = H.move(H.adapt(minipeft, case), case.scale)
    model = copy.deepcopy(alone)
    batch, before = H.inputs(case), H.snapshot(alone)
    running = H.weighable(case, H.run(alone, batch))
    alone.merge_adapter()
    merged = frozen(H.snapshot(alone))
    if how == "merged first":
        model.merge_adapter()
    shard(model, parts=how == "in parts, after a forward")
    if how.endswith("after a forward"):
        H.run(model, batch)
    if how != "merged first":
        model.merge_adapter()
    saved = whole(model)
    wrong = differs(frozen(saved), merged, 0)
    wrong += differs(H.weighable(case, H.run(model, batch)), running, 2e-5)
    wrong += differs(frozen(whole(model)), merged, 0)
    try:
        set_model_state_dict(model, dict(before), options=StateDictOptions(full_state_dict=True))
        wrong.append("loaded into a merged model")
    except MergeError:
        pass
    model.unmerge_adapter()
    wrong += differs(whole(model), before, 0)
    options = StateDictOptions(full_state_dict=True, strict=False)
    moved = {k: t + 1 for k, t in frozen(before).items() if t.is_floating_point()}
    for values in (moved, frozen(before)):
        set_model_state_dict(model, dict(values), options=options)
        wrong += differs(whole(model), {**before, **values}, 0)
    wrong += differs(H.weighable(case, H.run(model, batch)), running, 2e-5)
    plain = model.merge_and_unload().state_dict()
    own = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in plain.items()}
    return wrong + differs(own, alone.merge_and_unload().state_dict(), 1e-6)


def work(rank, port, ids, out):
    faulthandler.dump_traceback_later(280, exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        if case.id in ids or f"+{case.id}" in ids:
            for how in HOW if f"+{case.id}" in ids else HOW[1:2]:
                try:
                    wrong = check(case, how)
                except Exception as error:  # the same in both processes, or the other one waits for ever
                    wrong = [f"{type(error).__name__}: {error}"[:300]]
                found.setdefault(case.id, []).extend(f"{how}: {what}" for what in wrong)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        with open(out, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = os.path.join(tempfile.mkdtemp(), "found.json")
    processes = [mp.get_context("fork").Process(target=work, args=(rank, port, sys.argv[1:], out)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"exit codes {[process.exitcode for process in processes]}")
    print(open(out).read())
