"""Models that torch traces, exports, compiles whole, transforms, or runs in inference mode give the same numbers."""

import importlib
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from . import harness as H
from .cases import CASES, each_case

# torch.func itself does not put back a tensor of a module that stands in several places, which these share with peft
SHARED = ("lily", "tinylora", "unilora", "vblora")
CLOSEST = ("lora", "dora", "ia3", "oft", "vera", "lokr")  # looked at with every tool, on every kind of layer
USUAL = "linear/plain", "conv2d/plain", "conv2d/kernel", "embedding/plain", "targets/modules_to_save"


def tried(case, everywhere=True):
    """The first case of each method, and those of `CLOSEST` on the usual layers."""
    name = case.id.partition("/")[2]
    if case.prompt or case.base.transformers or "task_ids" in case.inputs:  # Poly looks at the values of `task_ids`
        return False
    return name == "linear/plain" or (everywhere and case.method in CLOSEST and name in USUAL)


each = each_case(tried)
once = each_case(lambda case: tried(case, everywhere=False) and case.method in CLOSEST)


class Positional(nn.Module):
    """A model, called with the values of its arguments alone."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values):
        return self.model(**dict(zip(self.names, values)))


def moved(lib, case):
    """The model, its arguments, and what it gives for them."""
    batch = H.inputs(case)
    model = Positional(H.move(H.adapt(lib, case), case.scale), list(batch)).eval()
    args = tuple(batch.values())
    with torch.no_grad():
        return model, args, model(*args)


def same(got, want):
    H.close({"output": got.detach()}, {"output": want}, 1e-5)


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, *args):
    """By autograd, zero where there is none."""
    model.zero_grad()
    model(*args).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained}


@each
def test_jit_trace(case, lib):
    """The graph is the same with and without gradients: torch compares it with one made without."""
    model, args, want = moved(lib, case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, args)
    for on in (False, True):
        with torch.set_grad_enabled(on):
            same(traced(*args), want)


@each
def test_export(case, lib):
    model, args, want = moved(lib, case)
    same(torch.export.export(model, args, strict=False).module()(*args), want)


@once
def test_export_strict(case, lib):
    model, args, want = moved(lib, case)
    same(torch.export.export(model, args, strict=True).module()(*args), want)


@pytest.mark.parametrize("training", [False, True], ids=["no_grad", "grad"])
@once
def test_compiled_whole(case, lib, training):
    model, args, want = moved(lib, case)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        same(compiled(*args), want)


def test_mixed_batch_compiled_whole(lib):
    case = next(c for c in CASES if c.id == "lora/linear/plain")
    model = H.move(H.add(lib, H.adapt(lib, case), case, "other"), only=H.adapter_or_trainable)
    batch = H.inputs(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for names in (["other", "default", "__base__", "other"], None):
            same(compiled(**batch, adapter_names=names), model(**batch, adapter_names=names))


@each
def test_functional(case, lib):
    """torch.func: other values, gradients of a function of them, gradients of each sample, several adapters at once."""
    if case.method in SHARED:
        pytest.skip("torch does not put shared modules back")
    model, args, want = moved(lib, case)
    values, alone = trainable(model), gradients(model, *args)
    loss = lambda p, *args: functional_call(model, p, args).square().sum()
    same(functional_call(model, values, args), want)
    H.close(grad(loss)(values, *args), alone, 1e-4)
    each_sample = vmap(grad(lambda p, *sample: loss(p, *(t[None] for t in sample))), in_dims=(None, *[0] * len(args)))
    H.close({n: g.sum(0) for n, g in each_sample(values, *args).items()}, alone, 1e-4)
    stacked = {name: torch.stack([torch.zeros_like(p), p]) for name, p in values.items()}
    for on in (False, True):
        with torch.set_grad_enabled(on):
            same(vmap(lambda p: functional_call(model, p, args))(stacked)[1], want)
    same(model(*args), want)


@each
def test_models_stacked_whole(case, lib):
    """torch.func.stack_module_state: buffers as well as parameters, those of the adapters included."""
    if case.method in SHARED:
        pytest.skip("torch does not put shared modules back")
    model, args, want = moved(lib, case)
    values = stack_module_state([model, model])
    same(vmap(lambda p, b: functional_call(model, (p, b), args))(*values)[1], want)


@each
def test_inference_mode(case, lib):
    model, args, want = moved(lib, case)
    with torch.inference_mode():
        same(model(*args).clone(), want)
    assert gradients(model, *args).keys() == trainable(model).keys()  # nothing was kept that gradients cannot use


def test_factors_without_dropout_compile_with_two_adapters(lib):
    """A slot that an adapter looks for and does not have must not become a guard that fails."""
    config = lambda: lib.DeloraConfig(r=2, target_modules=["0", "2"])
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
    model = lib.get_peft_model(net, config())
    model.add_adapter("other", config())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name in ("default", "other"):
        model.set_adapter(name)
        compiled(torch.randn(3, 6)).sum().backward()


LINEARS = ["0", "2"]
SWITCHED = {
    "lora": lambda lib: lib.LoraConfig(r=2, target_modules=LINEARS),
    "dora": lambda lib: lib.LoraConfig(r=2, use_dora=True, target_modules=LINEARS),
    "ia3": lambda lib: lib.IA3Config(target_modules=LINEARS, feedforward_modules=["2"]),
    "vera": lambda lib: lib.VeraConfig(r=2, target_modules=LINEARS),
}


@pytest.mark.parametrize("training", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("method", SWITCHED)
def test_nothing_is_compiled_twice(method, training, lib, is_ref):
    """With dynamic=True one graph serves all scales and batch sizes; each adapter has its own, compiled once."""
    if is_ref:
        pytest.skip("peft's DoRA breaks the graph")
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    model = lib.get_peft_model(net, SWITCHED[method](lib))
    model.add_adapter("other", SWITCHED[method](lib))
    H.move(model, only=H.adapter_or_trainable)
    model.train(training)
    graphs = []
    torch._dynamo.reset()
    counting = lambda graph, inputs: graphs.append(graph) or graph.forward
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)

    def run(size):
        x = torch.randn(size, 6)
        with torch.set_grad_enabled(training):
            y = compiled(x)
            same(y, model(x).detach())
        if training:
            y.sum().backward()

    for name in ("default", "other"):  # the warm-up
        model.set_adapter(name)
        run(3)
    assert len(graphs) == 2
    for turn, name in enumerate(("default", "other", "default")):
        model.set_adapter(name)
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale(name, 0.5 + turn)
        for size in (3, 4, 7 + turn):
            run(size)
    assert len(graphs) == 2


def test_a_scale_held_by_compiled_code_can_be_set(lib, is_ref):
    """Prepared for hot swapping, the scaling is a tensor; setting it is seen, without a second graph."""
    if is_ref:
        pytest.skip("peft puts a float in the tensor's place")
    model = H.move(lib.get_peft_model(nn.Sequential(nn.Linear(6, 8)), lib.LoraConfig(r=2, target_modules=["0"])))
    hotswap = importlib.import_module(f"{lib.__name__}.compat.hotswap")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    own, held = float(layer.scaling["default"]), layer.scaling["default"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for change, scale in ((lambda: layer.set_scale("default", 3.0), 3.0), (lambda: layer.scale_layer(2.0), 6.0),
                              (lambda: layer.unscale_layer(4.0), 1.5), (layer.unscale_layer, 1.0)):
            change()
            assert layer.scaling["default"] is held and float(held) == own * scale
            same(compiled(x), model(x).detach())
