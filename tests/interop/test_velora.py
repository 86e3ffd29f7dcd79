"""VeLoRA while it trains: gradients, the projection, and what autograd keeps. Outputs are in the table of cases."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from . import bases as B
from . import harness as H
from .cases import each_case
from .cases.velora import GROUPS, LINEARS, velora

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
INITS = pytest.mark.parametrize("init", ["batch_average", "batch_average_once", "random"])
of_velora = each_case(lambda c: c.method == "velora")


def case_of(init, base=B.MLP_2D):
    return velora(f"training/{init}", base, LINEARS, velora_config={**GROUPS, "init_type": init})


def projections(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "velora_embed" in k}


def trained(model, batch, at=5):
    """Gradients in training mode; all that is random starts at one seed."""
    H.seed(at)
    return H.gradients(model.train(), batch)


@DTYPES
@of_velora
def test_gradients_in_training(case, dtype, lib, ref):
    theirs, ours = H.pair(ref, lib, case, dtype)
    batch = H.inputs(case, dtype)
    want, plain = trained(theirs, batch), H.gradients(copy.deepcopy(theirs).eval(), batch)
    got = trained(ours, batch)
    H.close(got, want, 10 * H.tolerance(case, dtype))
    H.close(projections(ours), projections(theirs), H.tolerance(case, dtype))
    if not case.kwargs.get("lora_dropout") and case.kwargs["velora_config"]["num_groups"] < 8:
        assert H.differ({k: v for k, v in want.items() if "lora_A" in k},
                        {k: v for k, v in plain.items() if "lora_A" in k}, 1e-2), "LoRA's gradients would do"


@INITS
def test_several_steps(init, lib, ref):
    """As in peft, batch by batch: the projection follows each, or the first one, or none."""
    case = case_of(init)
    models = H.pair(ref, lib, case)
    start, seen = projections(models[1]), []
    for step in range(3):
        batch = {"x": case.base.inputs(seed=20 + step)["x"] + 1}
        want, got = (trained(model, batch) for model in models)
        H.close(got, want, 1e-4)
        H.identical(projections(models[1]), projections(models[0]))
        seen.append(projections(models[1]))
    moved = [H.differ(a, b, 1e-3) for a, b in zip([start, *seen], seen)]
    times = {"batch_average": 3, "batch_average_once": 1, "random": 0}[init]
    assert moved == [True] * times + [False] * (3 - times)


def test_formula(lib):
    """The gradient of A, from the rebuilt inputs, row by row."""
    layer = torch.nn.Linear(7, 5).double()
    model = lib.get_peft_model(torch.nn.Sequential(layer), lib.LoraConfig(
        r=2, lora_alpha=6, target_modules=["0"], velora_config={"num_groups": 3, "scale": 0.5})).double().train()
    H.move(model)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).double()
    adapted = model.base_model.model[0]
    A, Bw = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    model(x).square().sum().backward()
    padded = torch.cat([x, torch.zeros(4, 2, dtype=x.dtype)], 1)
    parts = padded.view(4, 3, 3)
    v = parts.mean((0, 1))
    v = v / v.norm()
    rebuilt = torch.zeros_like(padded)
    for row in range(4):
        for g in range(3):
            rebuilt[row, 3 * g : 3 * g + 3] = 0.5 * (parts[row, g] @ v) * v
    y = (layer(x) + 3 * x @ A.T @ Bw.T).detach()
    want = (3 * (2 * y) @ Bw).T @ rebuilt[:, :7]
    torch.testing.assert_close(A.grad, want, rtol=1e-6, atol=1e-6)


@INITS
def test_input_is_not_kept(init, lib):
    """Between forward and backward a token costs num_groups numbers, not in_features."""
    case = velora("training/kept", B.MLP, ["square"], velora_config={"num_groups": 2, "init_type": init})
    model, x, kept = H.move(H.adapt(lib, case)), torch.randn(50, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        for train in (True, False):
            kept.clear()
            model.train(train).base_model.model.square(x)
            assert ((50, 2) in kept, (50, 8) in kept or (8, 50) in kept) == (train, not train)


@pytest.mark.parametrize("reentrant", [False, True])
@INITS
def test_gradient_checkpointing(init, reentrant, lib, ref):
    """The gradients are those without it, and peft's."""
    case, grads = case_of(init), []
    for module, through in ((ref, True), (lib, True), (lib, False)):
        model = H.move(H.adapt(module, case)).train()
        x = H.inputs(case)["x"].requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if through else model(x)
        out.sin().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    H.close(grads[1], grads[0], 1e-4)
    H.close(grads[1], grads[2], 1e-4)


def test_two_batches_before_one_backward(lib):
    """Each graph has the projection of its own batch."""
    case = case_of("batch_average")
    model = H.move(H.adapt(lib, case)).train()
    batches = [{"x": case.base.inputs(seed=s)["x"] + s} for s in (1, 2)]
    apart = [H.gradients(model, batch) for batch in batches]
    sum((y * torch.sin(y + 1)).sum() for y in [model(**batch) for batch in batches]).backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    H.close(together, {n: apart[0][n] + apart[1][n] for n in together}, 1e-4)


def test_zero_input(lib, ref):
    """A mean of zero gives no direction: all features count alike."""
    case = case_of("batch_average")
    models = H.pair(ref, lib, case)
    for model in models:
        model.train()(torch.zeros(2, 3, 8))
    H.identical(projections(models[1]), projections(models[0]))
    first = next(iter(projections(models[1]).values()))
    torch.testing.assert_close(first, torch.full_like(first, first.numel() ** -0.5))


def test_eval_leaves_the_projection(lib):
    model = H.adapt(lib, case_of("batch_average"))
    before = projections(model)
    model(H.inputs(case_of("batch_average"))["x"]).sum().backward()
    with torch.no_grad():
        model.train()(H.inputs(case_of("batch_average"))["x"])
    H.identical(projections(model), before)


def test_saved_projection(lib, ref, tmp_path):
    """It is in the checkpoint. Resumed, "once" keeps it, so that the steps are those of the unbroken run.

    (In peft the first batch after loading replaces it.)
    """
    case = case_of("batch_average_once")
    theirs, ours = H.pair(ref, lib, case)
    first, second = ({"x": case.base.inputs(seed=s)["x"] + s - 1} for s in (1, 2))
    for model in (theirs, ours):
        trained(model, first)
    unbroken, kept = trained(ours, second), projections(ours)
    H.identical(H.saved(ours, tmp_path / "ours")[0], H.saved(theirs, tmp_path / "theirs")[0])
    assert sum("velora_embed" in key for key in H.read(tmp_path / "ours" / "adapter_model.safetensors")) == len(LINEARS)
    resumed = lib.PeftModel.from_pretrained(case.base.build(), tmp_path / "theirs", is_trainable=True)
    H.identical(projections(resumed), kept)
    H.close(trained(resumed, second), unbroken, 1e-6)
    H.identical(projections(resumed), kept)
    in_peft = ref.PeftModel.from_pretrained(case.base.build(), tmp_path / "ours", is_trainable=True)
    H.identical(projections(in_peft), kept)
    trained(in_peft, second)
    assert lib is ref or H.differ(projections(in_peft), kept, 1e-3), "peft keeps it: the comment in velora.py is wrong"


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_weighted(kind, lib, ref):
    """Combined as LoRAs are."""
    case, outs = velora("training/weighted", B.MLP, LINEARS, second={}), []
    for model in H.pair(ref, lib, case, second=True):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=kind,
                                   **({"density": 0.5} if kind == "ties" else {}))
        model.set_adapter("sum")
        outs.append(H.run(model, H.inputs(case)))
    H.close(outs[1], outs[0], 1e-4)


def test_quantised_layer(lib, is_ref):
    """On bitsandbytes' layers too, which peft refuses."""
    if is_ref:
        pytest.skip("peft refuses it")
    model, x = H.on_four_bits(lib, velora_config=GROUPS)
    model(x).sum().backward()
    assert projections(model).popitem()[1].norm() == pytest.approx(1)
    H.assert_adds_its_delta(model, x)
