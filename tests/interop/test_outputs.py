"""Outputs and gradients: equal to peft's with every trainable tensor moved, in float64 and float32."""

import pytest
import torch

from . import harness as H
from .cases import each_case, firsts

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
FIRST = firsts(2)  # of each method on each kind of base model


def pair(ref, lib, case, dtype):
    """Both models, moved, the same for all tests of a case that leave them as they are."""
    if case.disputed:  # running may write, and the law is asked by merging
        return H.pair(ref, lib, case, dtype)
    return [model.to(dtype) for model in H.shared(case, "pair", lambda: H.pair(ref, lib, case))]


@DTYPES
@each_case()
def test_output(case, dtype, lib, ref):
    theirs, ours = pair(ref, lib, case, dtype)
    batch = H.inputs(case, dtype)
    got = H.run(ours, batch)
    if "outputs" in case.disputed:
        law_runs_as_it_merges(lib, case, ours, got, batch, dtype)
        return
    want = H.run(theirs, batch)
    H.close(got, want, H.tolerance(case, dtype))
    unmoved = H.run(H.adapt(ref, case).to(dtype), batch)
    assert H.differ(want, unmoved, 1e-4), "moving the adapter changed nothing: the case cannot fail"


def law_runs_as_it_merges(lib, case, ours, running, batch, dtype):
    skip_reference(lib, case, "outputs")
    ours.merge_adapter()
    H.close(H.run(ours, batch), running, H.tolerance(case, dtype))


def skip_reference(lib, case, what):
    if lib.__name__ == "peft":
        pytest.skip(f"disputed: {case.disputed[what]}")


@DTYPES
@each_case()
def test_gradients(case, dtype, lib, ref):
    theirs, ours = pair(ref, lib, case, dtype)
    batch = H.inputs(case, dtype)
    got = H.gradients(ours, batch)
    what = next((w for w in ("gradients", "outputs") if w in case.disputed), None)
    if what:
        skip_reference(lib, case, what)
        trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
        assert trainable <= set(got)
        agrees_with_differences(ours, case, got, dtype)
        return
    want = H.gradients(theirs, batch)
    assert any(not n.startswith("input:") for n in want), "no parameter has a gradient"
    H.close(got, want, 10 * H.tolerance(case, dtype))


def agrees_with_differences(model, case, grads, dtype):
    """The law of a gradient: it predicts how the function changes along a direction."""
    if dtype != torch.float64:
        return
    batch, step = H.inputs(case, dtype), 1e-6

    def value():
        return sum((v * torch.sin(v + 1)).sum().item() for v in H.run(model, batch).values())

    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        along = torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
        with torch.no_grad():
            p.add_(step * along)
            up = value()
            p.sub_(2 * step * along)
            down = value()
            p.add_(step * along)
        want = (grads[name] * along).sum().item()
        assert abs((up - down) / (2 * step) - want) <= 1e-4 * max(1.0, abs(want)), name


@each_case()
def test_running_changes_no_tensor(case, lib, is_ref):
    model = H.move(H.adapt(lib, case), case.scale)
    if is_ref and "running writes" in case.disputed:
        pytest.skip(f"disputed: {case.disputed['running writes']}")
    before = H.snapshot(model)
    H.run(model, H.inputs(case))
    H.identical(H.snapshot(model), before)


@each_case(lambda c: c.train)
def test_training_mode_at_equal_seed(case, lib, ref):
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    batch, outs = H.inputs(case, torch.float64), []
    for model in (ours.train(), theirs.train()):
        H.seed(5)
        outs.append(H.run(model, batch))
    H.close(*outs, H.tolerance(case, torch.float64))
    assert H.differ(outs[1], H.run(theirs.eval(), batch), 1e-4), "train and eval mode agree: the case cannot fail"


@each_case(lambda c: c.base.name in ("gpt2", "llama", "t5") and c.kwargs.get("task_type"))
def test_generate(case, lib, ref):
    """The same greedy tokens, from the same adapter."""
    theirs, ours = H.pair(ref, lib, case)
    batch = {k: v for k, v in H.inputs(case).items() if k in ("input_ids", "attention_mask", "task_ids")}
    if case.prompt and case.method not in ("prefix_tuning", "cartridge"):
        # peft counts padding behind the prompt among the positions: test_prompt_inputs has what is right there
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1}
    got, want = ours.generate(**batch, **options), theirs.generate(**batch, **options)
    assert torch.equal(got, want)


@each_case(lambda c: not c.prompt)
def test_half_precision_runs(case, lib, ref):
    """bfloat16 base, adapter in float32 (the default): same dtype and same numbers up to bfloat16's rounding."""
    theirs, ours = (H.adapt(module, case, dtype=torch.bfloat16) for module in (ref, lib))
    H.copy_values(H.move(theirs, case.scale), ours)
    batch = H.inputs(case, torch.bfloat16)
    got = H.run(ours, batch)
    if "outputs" not in case.disputed and case.id != "lora/targets/tying_embedding":  # there peft's cast breaks the tie
        H.close(got, H.run(theirs, batch), H.tolerance(case, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case(lambda c: c.id in FIRST and not c.base.transformers and "/targets/" not in c.id)  # depth rounds more
def test_gradients_under_autocast(case, dtype, lib):
    """The backward pass of what ran under autocast runs outside: the same numbers up to bfloat16's rounding."""
    model, batch = H.move(H.adapt(lib, case, dtype=dtype), case.scale), H.inputs(case, dtype)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = H.tensors(H.call(model, batch))
        model.zero_grad()
        sum((v.float() * torch.sin(v.float() + 1)).sum() for v in out.values()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    H.close(grads[1], grads[0], 0.1)
