"""What hangs on a module acts as if the module were called: hooks and parametrisations, in running and in merging."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from . import harness as H
from .cases import CASES

PLAIN = {}
for _case in CASES:
    if not _case.prompt and not _case.base.transformers:
        PLAIN.setdefault((_case.method, _case.base.name), _case)
each_method_and_layer = pytest.mark.parametrize("case", PLAIN.values(), ids=[c.id for c in PLAIN.values()])
CALLED = ("lora", "dora", "kasa", "qalora", "monteclora", "velora", "bdlora")  # peft calls their factors, if modules
FACTORED = [c for c in PLAIN.values() if c.method in CALLED and "embedding" not in c.id and "parameter" not in c.id]
each_factored = pytest.mark.parametrize("case", FACTORED, ids=[c.id for c in FACTORED])
each_slot = pytest.mark.parametrize("slot", ["lora_A", "lora_B"])
WITHOUT = [("monteclora", "lora_A")]  # peft reads the weight; so does the norm of its DoRA on convolutions
PEFTS_OWN = ("oft_R", "oft_embedding_R", "psoft_R", "lora_magnitude_vector")  # modules called with more than an input


def seen(model, batch):
    """Names of the modules in adapted layers whose hooks run."""
    names = set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *args, name=name: names.add(name))
    H.run(model, batch)
    ours = {n for n in names if ".default" in n and n.split(".")[-2] not in PEFTS_OWN}
    return ours | {n for n in names if n.endswith("base_layer")}


@each_method_and_layer
def test_hooks_of_all_modules_run_that_peft_calls(case, lib, ref):
    theirs, ours = (seen(H.move(H.adapt(m, case)), H.inputs(case)) for m in (ref, lib))
    assert theirs <= ours


@each_method_and_layer
def test_hooks_on_the_frozen_layer_run_before_and_after_merging(case, lib):
    model, count = H.move(H.adapt(lib, case)), []
    frozen = [m for n, m in model.named_modules() if n.endswith("base_layer") and "default" not in n]
    for module in frozen:
        module.register_forward_pre_hook(lambda *args: count.append("pre"))
        module.register_forward_hook(lambda *args: count.append("post"))
    replaced = case.method == "ln_tuning"  # another module stands in its place
    H.run(model, H.inputs(case))
    assert replaced or {"pre", "post"} <= set(count)
    count.clear()
    if case.merges and "merge" not in case.disputed:
        model.merge_adapter()
        H.run(model, H.inputs(case))
        assert {"pre", "post"} <= set(count)


def factors(model, slot):
    return [m for n, m in model.named_modules() if n.endswith(f"{slot}.default")]


def merged_as_it_runs(model, case, batch, running):
    try:
        model.merge_adapter()
    except ValueError:
        assert "merge" in case.disputed or not case.merges
    else:
        H.close(H.run(model, batch), running, 1e-8)


def halved(module, args):
    return (args[0] / 2,)


def turned(module, args, output):
    return -3 * output


@each_slot
@each_factored
def test_hooks_on_a_factor_act_as_in_peft_and_are_merged(case, slot, lib, ref):
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    batch = H.inputs(case, torch.float64)
    before = H.run(ours, batch)
    for module in factors(theirs, slot) + factors(ours, slot):
        module.register_forward_pre_hook(halved)
        module.register_forward_hook(turned)
    running = H.run(ours, batch)
    if case.base.name.startswith("attention"):
        assert factors(ours, slot)  # peft takes the weights of both factors there; here hooks act
    elif (case.method, slot) not in WITHOUT and not (case.method == "dora" and "conv" in case.id):
        H.close(running, H.run(theirs, batch), 1e-8)
    assert H.differ(running, before, 1e-4)
    merged_as_it_runs(ours, case, batch, running)


@each_factored
def test_hook_that_no_matrix_can_stand_for_is_not_merged(case, lib):
    model = H.move(H.adapt(lib, case))
    for module in factors(model, "lora_B"):
        module.register_forward_hook(lambda module, args, output: output.relu() + 1)
    before = H.snapshot(model)
    with pytest.raises(ValueError):
        model.merge_adapter()
    H.identical(H.snapshot(model), before)


class Double(nn.Module):
    def forward(self, W):
        return 2 * W


@each_method_and_layer
def test_parametrised_tensors_of_an_adapter_run_and_merge(case, lib):
    """Twice each tensor through a parametrisation is what twice the tensor is."""
    model, want = (H.move(H.adapt(lib, case).double()) for _ in range(2))
    batch = H.inputs(case, torch.float64)
    boxes = [(m, n) for path, m in want.named_modules() for n, p in m.named_parameters(recurse=False)
             if p.requires_grad and (n == "default" or (".default" in path and n == "weight"))]
    if not boxes or "modules_to_save" in str(boxes):
        pytest.skip("no tensor of the adapter alone")
    for module, name in boxes:
        module._parameters[name].data.mul_(2)
    for path, module in list(model.named_modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.requires_grad and (name == "default" or (".default" in path and name == "weight")):
                parametrize.register_parametrization(module, name, Double())
    running = H.run(want, batch)
    H.close(H.run(model, batch), running, 1e-9)
    if case.merges and "merge" not in case.disputed:
        merged_as_it_runs(model, case, batch, H.weighable(case, running))
