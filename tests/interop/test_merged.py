"""A model with adapters in its weights is still a model: it moves, is copied, trained, loaded into, and can go back."""

import copy
import pickle
import warnings

import pytest
import torch

from . import bases as B
from . import harness as H
from . import processes
from .cases import CASES, each_case, firsts

mergeable = [c for c in CASES if c.merges and not c.prompt and not {"merge", "restore"} & set(c.disputed)]
PLAIN = [c for c in mergeable if not c.base.transformers]
EACH_METHOD = firsts(1, PLAIN)
EACH_KIND = EACH_METHOD | {case.id for case in {case.base.name: case for case in PLAIN}.values()}
SEVERAL = firsts(2, [c for c in PLAIN if c.second is not None and c.stacks and "modules_to_save" not in c.kwargs])


@pytest.fixture(autouse=True)
def ours(is_ref):
    if is_ref:
        pytest.skip("promises of the module under test: peft subtracts what it added, and keeps nothing")


def merged(lib, case):
    """The case's model, merged, and its tensors from before."""
    model = H.move(H.adapt(lib, case), case.scale)
    before = H.snapshot(model)
    model.merge_adapter()
    return model, before


def overwritten(model, before):
    """The stored tensors that merging has changed, by name."""
    now = model.state_dict()
    return {k: t for k, t in now.items() if ".default" not in k and H.bits(t) != H.bits(before[k])}


CHANGES = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double and back": lambda model: model.double().float(),
    "half, part by part": lambda model: [part.half() for part in model.base_model.model.children()] and model,
    "deepcopy": copy.deepcopy,
    "meta": lambda model: model.to("meta"),
}


@each_case(lambda c: c.id in EACH_KIND)
def test_what_is_kept_goes_with_the_model(case, lib):
    start, before = merged(lib, case)
    for change in CHANGES.values():
        unmerged = H.adapt(lib, case)
        unmerged.load_state_dict(before)
        want = change(unmerged).state_dict()
        model = change(copy.deepcopy(start))
        assert list(model.state_dict()) == list(before), "a merged model has the same tensors in its state dict"
        model.unmerge_adapter()
        if any(tensor.is_meta for tensor in want.values()):
            assert all(tensor.is_meta for tensor in model.state_dict().values())
        else:
            H.identical(model.state_dict(), want)


@each_case(lambda c: c.id in EACH_KIND and c.method in ("lora", "ia3"))
def test_a_merged_model_is_pickled(case, lib):
    model, before = merged(lib, case)
    twin = pickle.loads(pickle.dumps(model))
    twin.unmerge_adapter()
    H.identical(H.snapshot(twin), before)


def in_place(owner, name):
    with torch.no_grad():
        getattr(owner, name).view(-1)[-1] += 1


def by_data(owner, name):
    getattr(owner, name).data.view(-1)[-1] += 1


def replaced(owner, name):
    setattr(owner, name, torch.nn.Parameter(getattr(owner, name) + 1, requires_grad=False))


@each_case(lambda c: c.id in EACH_KIND)
def test_an_edit_is_not_lost(case, lib):
    """Unmerging refuses to undo an edit, with nothing changed; merge_and_unload keeps it; it can be undone by hand."""
    start, before = merged(lib, case)
    names = overwritten(start, before)
    path, _, name = next(n for n, p in start.named_parameters() if n in names).rpartition(".")
    for edit in (in_place, by_data, replaced):
        model = copy.deepcopy(start)
        owner = model.get_submodule(path)
        old = getattr(owner, name).detach().clone()
        edit(owner, name)
        edited = H.snapshot(model)
        for step in (lambda m: m, lambda m: m.double().float()):  # moving a model does not hide it
            with pytest.raises(ValueError, match="merge_and_unload"):
                step(copy.deepcopy(model)).unmerge_adapter()
        for step in (model.unmerge_adapter, lambda m=model: m.base_model.set_adapter("default"), model.unload):
            with pytest.raises(ValueError, match="merge_and_unload"):
                step()
        H.identical(H.snapshot(model), edited)
        kept = copy.deepcopy(model).merge_and_unload().state_dict().values()
        assert any(torch.equal(t, edited[f"{path}.{name}"]) for t in kept)
        with torch.no_grad():
            getattr(owner, name).copy_(old)
        model.unmerge_adapter()
        H.identical(H.snapshot(model), before)


@each_case(lambda c: c.id in EACH_KIND)
def test_loading_into_merged_weights_is_refused(case, lib):
    model, before = merged(lib, case)
    now = H.snapshot(model)
    names = overwritten(model, before)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.load_state_dict({k: torch.zeros_like(t) for k, t in now.items()})
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.load_state_dict({k: torch.zeros_like(now[k]) for k in list(names)[:1]}, strict=False)
    H.identical(H.snapshot(model), now)
    model.load_state_dict({k: t for k, t in now.items() if ".default" in k}, strict=False)  # the adapter's own
    model.unmerge_adapter()
    model.load_state_dict(before)
    H.identical(H.snapshot(model), before)


@pytest.mark.parametrize("inference", [False, True])
@each_case(lambda c: c.id in EACH_METHOD)
def test_a_graph_held_across_a_merge(case, inference, lib):
    """Its gradients are right, or torch says that a tensor was changed."""
    model = H.move(H.adapt(lib, case), case.scale)
    trained = [p for p in model.parameters() if p.requires_grad]

    def start():
        H.seed(5)
        return sum((v * torch.sin(v + 1)).sum() for v in H.tensors(H.call(model, H.inputs(case))).values())

    want = torch.autograd.grad(start(), trained, allow_unused=True)
    held = start()
    with torch.inference_mode(inference):
        model.merge_adapter()
    try:
        got = torch.autograd.grad(held, trained, allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    H.close({str(i): g for i, g in enumerate(got) if g is not None},
            {str(i): g for i, g in enumerate(want) if g is not None}, 1e-6)


@each_case(lambda c: c.id in EACH_METHOD)
def test_merging_under_inference_mode(case, lib):
    """Merged inside and unmerged outside, or the reverse, the model is as it was and can be trained."""
    model, batch = H.move(H.adapt(lib, case), case.scale), H.inputs(case)
    before, gradients = H.snapshot(model), H.gradients(model, batch)
    running = H.weighable(case, H.run(model, batch))
    for inside in (True, False):
        with torch.inference_mode(inside):
            model.merge_adapter()
        H.close(H.weighable(case, H.run(model, batch)), running, 1e-4)
        with torch.inference_mode(not inside):
            model.unmerge_adapter()
        H.identical(H.snapshot(model), before)
        assert not any(t.is_inference() for t in model.state_dict().values())
    H.close(H.gradients(model, batch), gradients, 1e-6)


@each_case(lambda c: c.id in EACH_METHOD)
def test_a_base_made_under_inference_mode(case, lib):
    with torch.inference_mode():
        base = copy.deepcopy(case.base.build())
    own = lambda name, p: p.requires_grad and not p.is_inference()
    model = H.move(H.adapt(lib, case, base=base), case.scale, only=own)
    before, batch = H.snapshot(model), H.inputs(case)
    running = H.weighable(case, H.run(model, batch))
    model.merge_adapter()
    H.close(H.weighable(case, H.run(model, batch)), running, 1e-4)
    model.unmerge_adapter()
    H.identical(H.snapshot(model), before)


# ------------------------------------------------------------------------------------------------ several, one merged
def unmerge(model, name):
    for layer in model.base_model.modules():
        if name in getattr(layer, "merged_adapters", ()):
            layer.unmerge([name])


def assert_merging_one_changes_nothing(model, batch, names, tolerance, weighable=lambda out: out):
    """Whichever of the active adapters are merged, in whatever order, the output is the same."""
    before, want = H.snapshot(model), weighable(H.run(model, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge = lambda name: model.base_model.merge_adapter([name])
        out = lambda name: unmerge(model, name)
        for one, other in (names, names[::-1]):
            steps = ((merge, one), (merge, other), (out, one), (merge, one), (out, other), (out, one))
            for step, name in steps:
                step(name)
                H.close(weighable(H.run(model, batch)), want, tolerance)
    H.identical(H.snapshot(model), before)


@each_case(lambda c: c.id in SEVERAL)
def test_one_of_several_merged(case, lib):
    model = H.add(lib, H.adapt(lib, case), case, "other")
    model = H.move(model, case.scale, only=H.adapter_or_trainable).double()
    for order in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(order)
        assert_merging_one_changes_nothing(
            model, H.inputs(case, torch.float64), order, H.tolerance(case, torch.float64),
            lambda out: H.weighable(case, out),
        )


@each_case(lambda c: c.id in EACH_METHOD & SEVERAL)
def test_gradients_while_one_of_several_is_merged(case, lib):
    model = H.add(lib, H.adapt(lib, case), case, "other")
    model = H.move(model, case.scale, only=H.adapter_or_trainable).double()
    model.base_model.set_adapter(["default", "other"])
    want = H.gradients(model, H.inputs(case, torch.float64))
    model.merge_adapter(["default"])
    H.close(H.gradients(model, H.inputs(case, torch.float64)), want, H.tolerance(case, torch.float64))


NESTED = {
    "LoHa": lambda lib, targets: lib.LoHaConfig(r=2, target_modules=targets, init_weights=False),
    "LoKr": lambda lib, targets: lib.LoKrConfig(r=2, target_modules=targets, init_weights=False),
    "OFT": lambda lib, targets: lib.OFTConfig(r=0, oft_block_size=2, target_modules=targets, init_weights=False),
    "LoRA": lambda lib, targets: lib.LoraConfig(r=2, target_modules=targets, init_lora_weights=False),
}


@pytest.mark.parametrize("outer", NESTED)
@pytest.mark.parametrize("inner", NESTED)
@pytest.mark.parametrize("base, targets", [(B.MLP, ["square", "wide"]), (B.CONV2D, ["same", "first"])])
def test_one_of_several_methods_merged(base, targets, inner, outer, lib):
    H.seed(0)
    model = lib.get_peft_model(base.build(), NESTED[inner](lib, targets), "a", mixed=True)
    model.add_adapter("b", NESTED[outer](lib, targets))
    model = H.move(model.eval(), 0.1, only=lambda n, p: ".a." in n or ".b." in n or n.endswith((".a", ".b"))).double()
    model.set_adapter(["a", "b"])
    assert_merging_one_changes_nothing(model, base.inputs(torch.float64), ["a", "b"], 1e-10)


@pytest.mark.parametrize("outer", NESTED)
@pytest.mark.parametrize("inner", NESTED)
def test_several_methods_by_sample(inner, outer, lib):
    """In a mixed batch each sample runs as with its adapter alone, whichever of the two layers that stands on."""
    base, targets = B.CONV2D, ["same", "first"]
    model = lib.get_peft_model(base.build(), NESTED[inner](lib, targets), "a", mixed=True)
    model.add_adapter("b", NESTED[outer](lib, targets))
    model = model.eval().double()
    model.set_adapter(["a", "b"])
    batch, names = base.inputs(torch.float64), ["b", "a", "__base__", "b"]
    got = H.run(model, batch, adapter_names=names)["output"]
    with model.disable_adapter():
        alone = {"__base__": H.run(model, batch)["output"]}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = H.run(model, batch)["output"]
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], alone[name][row])


@pytest.mark.parametrize("follows", [True, False], ids=["tied adapters", "the embedding alone"])
def test_one_of_several_merged_into_a_tied_weight(follows, lib):
    H.seed(0)
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": follows, "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(B.LLAMA_TIED.build(), lib.LoraConfig(r=2, **options))
        model.add_adapter("other", lib.LoraConfig(r=3, **options))
    model = H.move(model.eval(), 0.1, only=lambda n, p: "lora" in n).double()
    model.base_model.set_adapter(["default", "other"])
    assert_merging_one_changes_nothing(model, B.LLAMA_TIED.inputs(torch.float64), ["default", "other"], 2e-6)
    inner = model.base_model.model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight, "after unmerging it is one tensor again"


def test_one_of_two_weights_in_the_same_memory(lib):
    """Merging into one of two parameters that are one piece of memory leaves the other as it is."""
    base = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    base[1].weight = torch.nn.Parameter(base[0].weight.data)
    model = lib.get_peft_model(base, lib.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    before, batch = H.snapshot(model), {"input": torch.randn(2, 6)}
    want = H.run(model, batch)
    model.merge_adapter()
    H.close(H.run(model, batch), want, 1e-5)
    assert torch.equal(base[1].weight, before["base_model.model.1.weight"])
    model.unmerge_adapter()
    H.identical(H.snapshot(model), before)
    assert base[0].base_layer.weight.data_ptr() == base[1].weight.data_ptr()


# ------------------------------------------------------------------------------------------------------- frozen stays
@pytest.mark.parametrize("inference", [True, False])
@each_case(lambda c: c.id in EACH_METHOD or "/modules_to_save" in c.id or c.id == "lora/targets/tying_modules_to_save")
def test_disabling_leaves_frozen_adapters_frozen(case, inference, lib):
    H.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(case.base.build(), H.config(lib, case, inference_mode=inference))
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    assert bool(before) is not inference
    with model.disable_adapter():
        H.run(model, H.inputs(case))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before


def test_a_disabled_adapter_trains_again_as_it_was_told(lib):
    config = lambda: lib.LoraConfig(r=2, target_modules=["square"], modules_to_save=["head"])
    model = lib.get_peft_model(B.MLP.build(), config())
    model.add_adapter("other", config())
    trained = lambda: {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        model.base_model.set_adapter("other")
    assert trained() == {"other"}
    with model.disable_adapter():
        model.base_model.set_adapter("default", inference_mode=True)
    assert not trained()


# ----------------------------------------------------------------------------------------------------------- sharded
LINEAR = firsts(1, [c for c in PLAIN if c.base.name in ("mlp", "mlp2d", "norms")]) | {"lora/targets/modules_to_save"}
IN_ALL_WAYS = ("lora", "dora", "ia3", "oft", "vera", "lokr")


def test_merging_a_sharded_model():
    """FSDP2 in two processes: merged before and after a first forward, the weights of one process to the bit."""
    ids = [f"+{id}" if id.split("/")[0] in IN_ALL_WAYS else id for id in sorted(LINEAR)]
    found = processes.last_line(processes.run(processes.SCRIPTS / "fsdp_merge.py", *ids))
    assert len(found) == len(ids) > 30
    assert not {case: wrong for case, wrong in found.items() if wrong}


@each_case(lambda c: c.id in EACH_METHOD)
def test_merging_under_autocast(case, lib):
    model, twin = (H.move(H.adapt(lib, case), case.scale) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
        fresh = H.adapt(lib, case)
    twin.merge_adapter()
    H.identical(model.state_dict(), twin.state_dict())
    H.identical(fresh.state_dict(), H.adapt(lib, case).state_dict())


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_2"])
def test_a_start_that_changes_the_base_under_autocast(start, lib):
    def model():
        H.seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(16, 16))
        return lib.get_peft_model(base, lib.LoraConfig(target_modules=["0"], init_lora_weights=start)).state_dict()

    want = model()
    with torch.autocast("cpu", torch.bfloat16):
        H.identical(model(), want)


@each_case(lambda c: c.id in EACH_KIND)
def test_switched_off_at_once(case, lib):
    """Also where nobody calls the layer: other modules may read its weights."""
    model, before = merged(lib, case)
    assert overwritten(model, before)
    with model.disable_adapter():
        assert not overwritten(model, before)
    assert not overwritten(model, before)


def test_switched_off_where_the_layer_is_not_called(lib):
    H.seed(0)
    base = torch.nn.ModuleDict({"a": torch.nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    x = torch.randn(2, 3, 8)
    want = base["a"](x, x, x)[0]
    model = lib.get_peft_model(base, lib.LoraConfig(target_modules=["a.out_proj"], init_lora_weights=False)).eval()
    model.merge_adapter()
    assert not torch.allclose(base["a"](x, x, x)[0], want)
    with model.disable_adapter():
        torch.testing.assert_close(base["a"](x, x, x)[0], want)


CHANGED = {
    "scale": lambda layer: layer.set_scale("default", 0.5),
    "values": lambda layer: next(layer.adapters["default"].parameters()).data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGED)
@each_case(lambda c: c.id in SEVERAL)
def test_a_merged_adapter_that_has_changed_is_not_merged_anew(case, change, lib):
    model = H.adapt(lib, case)
    H.add(lib, model, case, "other")
    model.base_model.set_adapter(["default", "other"])
    H.move(model, case.scale)
    untouched = H.snapshot(model)
    model.merge_adapter(["default"])
    layers = [m for m in model.modules() if getattr(m, "merged_adapters", None)]
    if change == "scale" and not any("default" in getattr(layer, "scaling", ()) for layer in layers):
        pytest.skip("it has no scale")
    before = H.snapshot(model)
    model.merge_adapter(["other"])
    model.base_model.unmerge_adapter()
    model.merge_adapter(["default"])
    H.identical(H.snapshot(model), before)  # unchanged, it may
    CHANGED[change](layers[-1])
    before = H.snapshot(model)
    with pytest.raises(lib.PeftError, match="changed after it was merged"):
        model.merge_adapter(["other"])
    H.identical(H.snapshot(model), before)
    model.unmerge_adapter()
    assert not overwritten(model, untouched)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["its own forward", "a hook"])
@pytest.mark.parametrize("method", ["Lora", "LoHa", "IA3", "HRA"])
def test_partly_merged_the_layer_is_called_as_ever(method, kind, lib):
    H.seed(0)
    layer = Doubled(6, 6) if kind == "its own forward" else torch.nn.Linear(6, 6)
    x, seen = torch.randn(4, 6), []
    if kind == "a hook":
        layer.register_forward_hook(lambda module, args, y: seen.append(1) or 2 * y)
    fields = {"feedforward_modules": []} if method == "IA3" else {"r": 2}
    config = lambda: getattr(lib, f"{method}Config")(target_modules=["0"], **fields)
    model = lib.get_peft_model(torch.nn.Sequential(layer), config(), "a")
    model.add_adapter("b", config())
    model.base_model.set_adapter(["a", "b"])
    H.move(model.eval(), only=lambda n, p: ".a" in n or ".b" in n)
    want, count = model(x), len(seen)
    model.merge_adapter(["a"])
    assert model.base_model.model[0].merged_adapters == ["a"]
    torch.testing.assert_close(model(x), want)
    assert len(seen) == 2 * count
