"""Methods that change while training, step by step, and what is saved in between and after: AdaLoRA, AdaMSS."""

import json
import warnings

import pytest
import torch

from . import harness as H
from .cases import CASES, each_case

STEPS = 13
scheduled = each_case(lambda c: c.method == "adalora" and not c.train)
allocated = each_case(lambda c: c.kwargs.get("use_asa"))


def trained(model, case, steps=range(STEPS)):
    """Run the schedule with plain gradient steps; yield the state after every step, and what is left to train."""
    batch = H.inputs(case, torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in steps:
        for p in parameters:
            p.grad = None
        out = H.tensors(H.call(model, batch))
        (out["loss"] if "loss" in out else sum((v * torch.sin(v + 1)).sum() for v in out.values())).backward()
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.sub_(0.02 * p.grad / (p.grad.norm() + 1e-3))
        model.base_model.update_and_allocate(step)
        if case.method == "adalora":
            left = next(iter(model.peft_config.values())).rank_pattern
        else:
            left = [n for n, p in model.named_parameters() if p.requires_grad]
        yield H.snapshot(model), json.loads(json.dumps(left, default=lambda t: t.tolist()))


@scheduled
def test_every_step(case, lib, ref):
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    pruned = False
    for (want, want_pattern), (got, got_pattern) in zip(trained(theirs, case), trained(ours, case)):
        H.close(got, want, 1e-6 if case.base.float32_inside else 1e-9)
        assert got_pattern == want_pattern
        pruned |= any((v == 0).any() for k, v in want.items() if "lora_E" in k)
    assert pruned, "nothing was pruned: the case cannot fail"


@pytest.mark.parametrize("direction", ["peft to us", "us to peft"])
@scheduled
def test_saved_after_pruning(case, direction, lib, ref, tmp_path):
    """The checkpoint holds the ranks that are left; the loaded adapter has them and gives the same output."""
    writer, reader = (ref, lib) if direction == "peft to us" else (lib, ref)
    model = H.move(H.adapt(writer, case), case.scale).double()
    for _ in trained(model, case):
        pass
    model.eval()
    tensors, config = H.saved(model, tmp_path)
    assert config["rank_pattern"]
    batch = H.without_labels(H.inputs(case, torch.float64)) if case.own_loss else H.inputs(case, torch.float64)
    want = H.run(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = reader.PeftModel.from_pretrained(case.base.build(torch.float64), str(tmp_path)).eval()
    H.close(H.run(loaded, batch), want, 1e-5)
    H.same_names(reader.get_peft_model_state_dict(loaded), tensors)


def test_the_table_has_a_schedule():
    assert [c for c in CASES if c.method == "adalora"]


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
@each_case(lambda c: c.id == "adalora/bert_seq/plain")
def test_orthogonal_regularisation(case, weight, lib, ref):
    losses = []
    for module in (ref, lib):
        model = module.get_peft_model(case.base.build(), H.config(module, case, orth_reg_weight=weight)).eval()
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        losses.append(H.run(model.double(), H.inputs(case, torch.float64))["loss"])
    assert torch.allclose(losses[1], losses[0], rtol=1e-10)


def importance(model):
    """AdaMSS's moving averages, by layer, kind and number of the subspace; those that are known."""
    return {
        f"{name}.{slot}.{adapter}.{k}": mean.clone()
        for name, layer in model.named_modules()
        for slot in ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")
        for adapter, means in getattr(layer, slot, {}).items()
        for k, mean in enumerate(means)
        if mean is not None
    }


@allocated
def test_every_step_of_the_allocation(case, lib, ref):
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    counts = []
    for (want, want_left), (got, got_left) in zip(trained(theirs, case), trained(ours, case)):
        H.close(got, want, 1e-9)
        assert got_left == want_left
        H.same_names(importance(ours), importance(theirs))
        if importance(theirs):
            H.close(importance(ours), importance(theirs), 1e-9)
        counts.append(len(got_left))
    assert len(set(counts)) > 2 and counts[-1] > 0, f"parameters left after each step: {counts}"


@pytest.mark.parametrize("direction", ["peft to us", "us to peft"])
@allocated
def test_allocation_resumed_from_a_checkpoint(case, direction, lib, ref, tmp_path):
    """Both go on alike: with what was saved, all subspaces trained again and nothing known of their importance."""
    writer = ref if direction == "peft to us" else lib
    model = H.move(H.adapt(writer, case), case.scale).double()
    for _ in trained(model, case, range(5)):
        pass
    tensors, _ = H.saved(model, tmp_path)
    models = [
        module.PeftModel.from_pretrained(case.base.build(torch.float64), str(tmp_path), is_trainable=True).eval()
        for module in (ref, lib)
    ]
    for loaded, module in zip(models, (ref, lib)):
        H.identical(dict(module.get_peft_model_state_dict(loaded)), tensors)
    counts = []
    for (want, want_left), (got, got_left) in zip(*(trained(m, case, range(5, STEPS)) for m in models)):
        H.close(got, want, 1e-9)
        assert got_left == want_left
        counts.append(len(got_left))
    assert counts[-1] < counts[0], f"parameters left after each step: {counts}"
