"""What a call tells the layers belongs to that call and its thread.

Other threads, copies, later calls, and gradients that run layers again, see their own.
"""

import copy
import functools
import gc
import itertools
import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from . import bases as B
from . import harness as H
from .cases import CASES, each_case


@pytest.fixture(autouse=True)
def _not_the_reference(is_ref):
    if is_ref:
        pytest.skip("peft keeps what a call tells on the model")


def once_each(where):
    """The first case of each form of each method for which `where` holds."""
    seen = set()

    def new(case):
        forms = {key for key in case.kwargs if key.endswith("_config") or key in ("use_dora", "init_weights")}
        key = case.method, *forms
        return where(case) and not (key in seen or seen.add(key))

    return each_case(new)


def mixes(case):
    return case.second is not None and case.mixed is not None


mixed = once_each(lambda case: (mixes(case) and not case.prompt) or case.method == "prompt_tuning")


def two(lib, case):
    """The case with two adapters, moved, both of them trainable."""
    model = H.add(lib, H.adapt(lib, case), case, "other").eval()
    for name, p in model.named_parameters():
        if p.is_floating_point() and (".other" in name or ".default" in name):
            p.requires_grad_(True)
    return H.move(model, case.scale)


BASE = "__base__"


def calls(case):
    """Two calls that mix the adapters in different ways."""
    rows = ["other", "default", BASE, "other"], ["default", "default", "other", BASE]
    if case.prompt:
        rows = [[name.replace(BASE, "default") for name in names] for names in rows]
    return [{**H.without_labels(H.inputs(case)), "adapter_names": names} for names in rows]


def overlapping(model, first, second, at=None):
    """Both calls' outputs, the second begun when the first was inside `at`, and ended when the first had ended."""
    here, inside, begun, outputs = threading.local(), threading.Event(), threading.Event(), {}

    def wait(*args):
        who = getattr(here, "who", None)
        here.who = None
        if who == 0:
            inside.set()
            assert begun.wait(10)
        elif who == 1:
            begun.set()
            threads[0].join(10)
            assert not threads[0].is_alive()

    def call(who, batch):
        here.who = who
        try:
            outputs[who] = H.run(model, batch)
        except BaseException as error:
            outputs[who] = error
        finally:
            (inside, begun)[who].set()

    hook = (at or model.get_base_model()).register_forward_pre_hook(wait)
    threads = [threading.Thread(target=call, args=(who, batch)) for who, batch in enumerate((first, second))]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    hook.remove()
    for output in outputs.values():
        if isinstance(output, BaseException):
            raise output
    return outputs[0], outputs[1]


def runs_alone(model, batches):
    return [H.run(model, batch) for batch in batches]


@mixed
def test_overlapping_calls(case, lib):
    model = two(lib, case)
    plain, batches = H.without_labels(H.inputs(case)), calls(case)
    names, before = list(model.state_dict()), H.run(model, plain)
    alone = runs_alone(model, batches)
    assert H.differ(*alone, 1e-6)
    for one, other in ((0, 1), (1, 0)):
        got = overlapping(model, batches[one], batches[other])
        H.identical(got[0], alone[one])
        H.identical(got[1], alone[other])
    got = overlapping(model, batches[0], plain)
    H.identical(got[0], alone[0])
    H.identical(got[1], before)
    got = overlapping(model, plain, batches[0])
    H.identical(got[0], before)
    H.identical(got[1], alone[0])
    H.identical(H.run(model, plain), before)
    assert list(model.state_dict()) == names


@once_each(lambda case: "task_ids" in case.inputs or case.method == "alora")
def test_overlapping_calls_of_samples(case, lib):
    """Tasks, and where an adapter begins in each sample."""
    model = H.move(H.adapt(lib, case), case.scale)
    first = H.without_labels(H.inputs(case))
    second = {key: value.flip(0) if torch.is_tensor(value) else value for key, value in first.items()}
    alone = runs_alone(model, (first, second))
    assert H.differ(*alone, 1e-6)
    got = overlapping(model, first, second)
    H.identical(got[0], alone[0])
    H.identical(got[1], alone[1])


def test_many_threads(lib):
    model = two(lib, next(c for c in CASES if c.id == "lora/linear/plain"))
    batch = H.inputs(next(c for c in CASES if c.id == "lora/linear/plain"))
    rows = list(itertools.product((BASE, "default", "other"), repeat=len(batch["x"])))
    want = {names: H.run(model, {**batch, "adapter_names": list(names)})["output"] for names in rows}
    before, wrong = H.run(model, batch)["output"], []

    def work(start):
        with torch.no_grad():
            for names in rows[start:] + rows[:start]:
                wrong.extend([] if torch.equal(model(**batch, adapter_names=list(names)), want[names]) else [names])
                wrong.extend([] if torch.equal(model(**batch), before) else ["plain"])

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 20, 40, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_overlapping_generation(lib):
    """With a prompt: what prepares a step is the thread's own, and the model's own afterwards."""
    pytest.importorskip("transformers")
    base = B.LLAMA.build()
    config = lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = H.move(lib.get_peft_model(base, config), 1.0).eval()
    ids = torch.arange(3, 13).view(2, 5)
    generate = functools.partial(model.generate, input_ids=ids, max_new_tokens=4, output_logits=True,
                                 return_dict_in_generate=True)
    want = torch.stack(generate().logits)
    bare = functools.partial(base.generate, input_ids=ids, max_new_tokens=4, output_logits=True,
                             return_dict_in_generate=True)
    own = torch.stack(bare().logits)

    class Calls:  # what `overlapping` needs of a model
        def __call__(self, which):
            return torch.stack(which().logits)

        def get_base_model(self):
            return base

    for pair, wanted in (((generate, generate), (want, want)), ((generate, bare), (want, own))):
        got = overlapping(Calls(), {"which": pair[0]}, {"which": pair[1]})
        for output, right in zip(got, wanted):
            assert torch.equal(output["output"], right)
    assert "prepare_inputs_for_generation" not in vars(base)


# --------------------------------------------------------------------------------- gradients that run layers once more
def checkpointed(model, **options):
    """The model, whose layers are run again for their gradients."""
    for module in model.get_base_model().children():
        module.forward = functools.partial(checkpoint, module.forward, **options)
    return model


def of_chain(case):
    return case.base.name == "mlp" and not case.prompt


AGAIN = pytest.mark.parametrize("reentrant", [False, True])
ELSEWHERE = pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "other thread"])


def gradients_of_both(model, batches, elsewhere=False):
    """Gradients of two passes, the second begun before the first one's are computed, and then of both together."""
    found = []

    def out(batch):
        batch = {key: value.requires_grad_() if key == "x" else value for key, value in copy.deepcopy(batch).items()}
        return H.call(model, batch)

    def note(*losses):
        model.zero_grad()
        run = sum(losses).backward
        if elsewhere:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    first, second = map(out, batches)
    note((first * torch.sin(first)).sum())
    note((second * torch.sin(second)).sum())
    first, second = map(out, batches)
    note((first * torch.sin(first)).sum(), (second * torch.cos(second)).sum())
    return found


def same_gradients(model, batches, reentrant, elsewhere):
    want = gradients_of_both(model, batches)
    assert any(H.differ({"g": want[0][n]}, {"g": want[1][n]}, 1e-6) for n in want[0].keys() & want[1].keys())
    got = gradients_of_both(checkpointed(model, use_reentrant=reentrant), batches, elsewhere)
    for one, other in zip(got, want):
        H.close(one, other, 1e-5)


@once_each(lambda case: mixes(case) and of_chain(case))
def test_run_again_for_a_mixed_batch(case, lib):
    same_gradients(two(lib, case), calls(case), False, False)


@AGAIN
@ELSEWHERE
def test_run_again_elsewhere(lib, reentrant, elsewhere):
    case = next(c for c in CASES if c.id == "lora/linear/plain")
    same_gradients(two(lib, case), calls(case), reentrant, elsewhere)


@AGAIN
@ELSEWHERE
def test_run_again_for_tasks(lib, reentrant, elsewhere):
    case = next(c for c in CASES if c.id == "poly/linear/plain")
    first = H.inputs(case)
    second = {**first, "task_ids": first["task_ids"].flip(0)}
    same_gradients(H.move(H.adapt(lib, case), 0.3), (first, second), reentrant, elsewhere)


@AGAIN
@ELSEWHERE
def test_run_again_for_samples(lib, reentrant, elsewhere):
    config = lib.LoraConfig(target_modules=["square", "wide"], alora_invocation_tokens=[1], init_lora_weights=False)
    model = lib.get_peft_model(B.MLP.build(), config)
    batches = [{**B.MLP.inputs(), "alora_offsets": offsets} for offsets in ([1, None, 2, 3], [3, 2, None, 1])]
    same_gradients(model, batches, reentrant, elsewhere)


@pytest.mark.parametrize("together", [False, True], ids=["one pass", "two passes"])
def test_run_again_on_another_device(lib, together):
    """Autograd has a thread for each device, here played by one where nothing is open; two passes are an error."""
    case = next(c for c in CASES if c.id == "poly/linear/plain")
    model, batch = H.move(H.adapt(lib, case), 0.3), H.inputs(case)
    want = gradients_of_both(model, (batch, batch))[0]
    model.zero_grad()
    opened = model.base_model.context.opened
    first = model.get_base_model().square
    run = first.forward

    def elsewhere(x):
        inside = opened[1:] if torch._C._current_graph_task_id() != -1 else []
        del opened[len(opened) - len(inside) :]
        try:
            return run(x)
        finally:
            opened.extend(inside)

    first.forward = functools.partial(checkpoint, elsewhere, use_reentrant=False)
    outputs = [H.call(model, one) for one in ([batch, batch] if together else [batch])]
    loss = sum((y * torch.sin(y)).sum() for y in outputs)
    if together:
        with pytest.raises(lib.BatchError, match="task_ids"):
            loss.backward()
    else:
        loss.backward()
        H.close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want, 1e-5)
    assert len(opened) == 1
    assert len(H.run(model, batch)["output"]) == len(batch["x"])


# --------------------------------------------------------------------------------------------- calls that end otherwise
@pytest.fixture
def lora(lib):
    case = next(c for c in CASES if c.id == "lora/linear/plain")
    return two(lib, case), H.inputs(case)


NAMES = ["other", "default", BASE, "other"]


def test_after_a_failure(lib, lora):
    model, batch = lora
    before = H.run(model, batch)

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.get_base_model().head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**batch, adapter_names=NAMES)
    hook.remove()
    H.identical(H.run(model, batch), before)


@AGAIN
def test_after_a_failure_when_run_again(lora, reentrant):
    model, batch = lora
    before, again = H.run(model, batch), []

    def fail(*args):
        if again:
            raise KeyboardInterrupt

    loss = checkpointed(model, use_reentrant=reentrant)(batch["x"].requires_grad_(), adapter_names=NAMES).sum()
    again.append(model.get_base_model().wide.base_layer.register_forward_pre_hook(fail))
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    again.pop().remove()
    H.identical(H.run(model, batch), before)


def test_calls_inside_calls(lora):
    model, batch = lora
    want, inside = H.run(model, {**batch, "adapter_names": NAMES}), []
    other = {**batch, "adapter_names": NAMES[::-1]}
    alone = H.run(model, other)

    def call(*args):
        hook.remove()
        inside.append(H.run(model, other))

    hook = model.get_base_model().wide.register_forward_pre_hook(call)
    H.identical(H.run(model, {**batch, "adapter_names": NAMES}), want)
    H.identical(inside[0], alone)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_abandoned(lora, elsewhere):
    """A generator that opened a pass and is never finished, and that somebody else closes."""
    model, batch = lora
    before, want = H.run(model, batch), H.run(model, {**batch, "adapter_names": NAMES})

    def steps():
        with model._enable_peft_forward_hooks(adapter_names=NAMES):
            yield H.run(model, batch)

    one, two = steps(), steps()
    H.identical(next(one), want)
    next(two)
    one.close()  # not the last that was opened
    if elsewhere:
        thread = threading.Thread(target=two.close)
        thread.start()
        thread.join()
    else:
        del two
        gc.collect()
    H.identical(H.run(model, batch), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copied_inside(lora, duplicate):
    """A copy begins outside of any call, and its layers go on hearing what it is told."""
    model, batch = lora
    before, want = H.run(model, batch), H.run(model, {**batch, "adapter_names": NAMES})
    with model._enable_peft_forward_hooks(adapter_names=NAMES):
        made = duplicate(model)
    H.identical(H.run(made, {**batch, "adapter_names": NAMES}), want)
    H.identical(H.run(made, batch), before)


# ------------------------------------------------------------------------------------ arguments for what is not there
def test_a_model_whose_adapters_are_off_needs_no_tasks(lib):
    model = lib.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), lib.PolyConfig(target_modules=["0"])).eval()
    x = torch.randn(2, 8)
    with model.disable_adapter():
        assert torch.equal(model(x), model.get_base_model()[0].base_layer(x))


@pytest.mark.parametrize("method", ["Lora", "LoHa", "IA3", "OFT"])
def test_no_model_sees_the_offsets_of_alora(method, lib):
    options = {"IA3": {"feedforward_modules": []}, "OFT": {"oft_block_size": 4, "r": 0}}.get(method, {})
    config = getattr(lib, f"{method}Config")(target_modules=["0"], **options)
    model = lib.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
    assert model(torch.randn(2, 8), alora_offsets=[None, None]).shape == (2, 8)
