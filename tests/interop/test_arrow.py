"""Arrow: saved LoRA experts, among which a router chooses for every token. One alone cannot be built in peft, so all of
what it does is here."""

import copy
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

from . import bases as B
from . import harness as H

LINEARS = ["square", "wide", "thin"]
CASES = {
    "plain": {},
    "one": {"top_k": 1},
    "all": {"top_k": 4},
    "cold": {"router_temperature": 0.05},
    "warm": {"router_temperature": 20.0, "top_k": 4},
    "gks": {"use_gks": True},
    "gks_one": {"use_gks": True, "top_k": 1, "router_temperature": 0.3},
}
each = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def expert(lib, folder, name, at, base=B.MLP_2D, **changes):
    """The folder of a saved LoRA adapter, drawn at seed `at`."""
    H.seed(at)
    given = {"target_modules": LINEARS, "r": 2, "lora_alpha": 3 + at % 3, "use_rslora": at % 2 == 1, **changes}
    config = lib.LoraConfig(init_lora_weights=False, **given)
    lib.get_peft_model(base.build(), config).save_pretrained(str(folder / name))
    return str(folder / name)


@pytest.fixture(scope="module")
def saved(lib, tmp_path_factory):
    """Folders of four task experts, and of two general ones."""
    folder = tmp_path_factory.mktemp("experts")
    tasks = [expert(lib, folder, f"task{i}", i) for i in range(4)]
    return tasks, [expert(lib, folder, f"gks{i}", 9 + i) for i in range(2)]


def create(lib, saved, base=None, at=None, dtype=None, autocast=True, **fields):
    """The Arrow model of the saved experts; its random numbers are seeded unless `at` says otherwise."""
    base = B.MLP_2D.build(dtype or torch.float32) if base is None else base
    config = lib.ArrowConfig(**{"top_k": 2, "rng_seed": 5 if at is None else None, **fields})
    H.seed(at or 0)
    options = {} if autocast else {"autocast_adapter_dtype": False}
    model = lib.create_arrow_model(base, saved[0], config, saved[1] if config.use_gks else None, **options)
    return model.to(dtype) if dtype == torch.float64 else model


def both(ref, lib, saved, **options):
    return create(ref, saved, **options), create(lib, saved, **options)


def batch(dtype=torch.float32):
    return B.MLP_2D.inputs(dtype)


# -------------------------------------------------------------------------------------------------------- the same
@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs(fields, dtype, ref, lib, saved):
    theirs, ours = both(ref, lib, saved, dtype=dtype, **fields)
    got = H.run(ours, batch(dtype))
    H.close(got, H.run(theirs, batch(dtype)), H.TOLERANCE[dtype])
    with ours.disable_adapter():
        assert H.differ(H.run(ours, batch(dtype)), got, 1e-2)


@each
def test_gradients(fields, ref, lib, saved):
    """Of the input, and of experts that are trained with the router: through the choice, too."""
    found = []
    for model in both(ref, lib, saved, dtype=torch.float64, **fields):
        H.run(model, batch(torch.float64))  # peft's first run changes the weights
        model.base_model.set_requires_grad(["task_0", "task_2", "gks_0"])
        found.append(H.gradients(model, batch(torch.float64)))
    theirs, ours = found
    assert any("task_0" in name for name in ours) and not any("gks_0" in name for name in ours)
    H.close(ours, theirs, H.TOLERANCE[torch.float64])


def test_half_precision_experts(ref, lib, saved):
    theirs, ours = both(ref, lib, saved, dtype=torch.bfloat16, autocast=False)
    ours, theirs = (model.to(torch.bfloat16) for model in (ours, theirs))  # each library has made the router float32
    H.close(H.run(ours, batch(torch.bfloat16)), H.run(theirs, batch(torch.bfloat16)), H.TOLERANCE[torch.bfloat16])


def test_without_seed(ref, lib, tmp_path):
    """The power iteration starts from torch's random generator: equal at equal seed. It is drawn once for an expert."""
    folders = [expert(lib, tmp_path, str(i), i, r=8) for i in range(4)]
    models = [*both(ref, lib, (folders, None), at=1), create(lib, (folders, None), at=1)]
    outputs = []
    for seed, model in zip((7, 7, 8), models):
        H.seed(seed)
        outputs.append(H.run(model, batch()))
    H.close(outputs[1], outputs[0], H.TOLERANCE[torch.float32])
    assert H.differ(outputs[2], outputs[1], 1e-4)
    H.identical(H.run(copy.deepcopy(models[1]), batch()), outputs[1])


def test_dropout_of_the_router(ref, lib, saved):
    """It acts on what the experts add, while training."""
    found = []
    for module in (ref, lib):
        model = create(module, saved)
        arrow = module.ArrowConfig(2, rng_seed=1)
        arrow.task_adapter_names, arrow.gks_adapter_names = ["task_0"], []
        config = module.LoraConfig(target_modules=LINEARS, lora_dropout=0.4, arrow_config=arrow)
        model.delete_adapter("arrow_router")
        model.add_adapter("arrow_router", config)
        model.set_adapter("arrow_router")
        calm = H.run(model, batch())
        H.seed(4)
        found.append(H.run(model.train(), batch()))
        assert H.differ(found[-1], calm, 1e-2)
    H.close(found[1], found[0], H.TOLERANCE[torch.float32])


def test_names_and_state(ref, lib, saved):
    """The same tensors, and the same ones are trained. The router's own are drawn: peft draws for loaded ones, too."""
    theirs, ours = both(ref, lib, saved, use_gks=True)
    states = [m.state_dict() for m in (ours, theirs)]
    kinds = [{k: (t.shape, t.dtype) for k, t in state.items()} for state in states]
    assert kinds[0] == kinds[1]
    H.identical(*[{k: t for k, t in state.items() if "lora_A.arrow_router" not in k} for state in states])
    bounds = [ours.get_submodule(f"base_model.model.{n}").lora_A["arrow_router"].weight.abs().max() for n in LINEARS]
    assert all(0 < bound <= n**-0.5 for bound, n in zip(bounds, (8, 8, 12)))
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (theirs, ours)]
    assert trained[0] == trained[1] and all("arrow_router" in n for n in trained[0])
    assert ours.active_adapter == theirs.active_adapter == "arrow_router" and not ours.training
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    config = ours.peft_config["arrow_router"].arrow_config
    assert config.task_adapter_names == [f"task_{i}" for i in range(4)]
    assert config.gks_adapter_names == ["gks_0", "gks_1"]


def test_mixed_batch(ref, lib, saved):
    names = ["arrow_router", "task_1", "__base__", "arrow_router"]
    outputs = [H.run(m, batch(), adapter_names=names) for m in both(ref, lib, saved)]
    H.close(outputs[1], outputs[0], H.TOLERANCE[torch.float32])


def test_beside_an_expert(ref, lib, saved):
    """Router and expert active together add up."""
    models = both(ref, lib, saved)
    for model in models:
        model.base_model.set_adapter(["arrow_router", "task_1"])
    H.close(*[H.run(m, batch()) for m in reversed(models)], H.TOLERANCE[torch.float32])


def test_scales_of_experts(ref, lib, saved):
    models = both(ref, lib, saved, top_k=4)
    before = H.run(models[1], batch())
    for model in models:
        for name in LINEARS:
            model.get_submodule(f"base_model.model.{name}").set_scale("task_2", 3.0)
    ours = H.run(models[1], batch())
    H.close(ours, H.run(models[0], batch()), H.TOLERANCE[torch.float32])
    assert H.differ(ours, before, 1e-3)


# --------------------------------------------------------------------------------------------- experts come and go
@each
def test_expert_added(fields, ref, lib, saved, tmp_path):
    """Before the first run, and after it: it is chosen from, and purified."""
    folder = expert(lib, tmp_path, "new", 21, lora_alpha=40)
    for at_once in (True, False):
        models = both(ref, lib, saved, **{**fields, "top_k": 2})
        before = H.run(create(lib, saved, **{**fields, "top_k": 2}), batch())
        for model in models:
            if not at_once:
                H.run(model, batch())
            model.load_adapter(folder, "new")
        ours = H.run(models[1], batch())
        H.close(ours, H.run(models[0], batch()), H.TOLERANCE[torch.float32])
        assert H.differ(ours, before, 1e-3)


def test_expert_deleted(ref, lib, saved):
    """The rest is chosen from. peft looks for the expert that is gone."""
    theirs, ours = both(ref, lib, saved)
    for model in (theirs, ours):
        H.run(model, batch())
        model.delete_adapter("task_3")
    with pytest.raises(KeyError):
        H.run(theirs, batch())
    fewer = create(lib, (saved[0][:3], saved[1]))
    H.close(H.run(ours, batch()), H.run(fewer, batch()), 1e-6)
    for name in ("task_1", "task_2"):
        ours.delete_adapter(name)
    with pytest.raises(lib.ConfigError, match="top_k=2 experts, but 'square' has 1"):
        H.run(ours, batch())
    ours.delete_adapter("task_0")
    H.identical(H.run(ours, batch()), H.run(B.MLP_2D.build(), batch()))


def test_router_deleted(lib, saved):
    ours = create(lib, saved)
    ours.delete_adapter("arrow_router")
    assert not any("arrow" in name for name, _ in ours.named_modules())
    H.run(ours, batch())


def test_expert_changed(ref, lib, saved):
    """Its direction is computed anew. In peft the router keeps the old one, until the model is loaded again."""
    for module in (ref, lib):
        used = create(module, saved)
        H.run(used, batch())
        fresh = create(module, saved)
        for model in (used, fresh):
            with torch.no_grad():
                for name in LINEARS:
                    layer = model.get_submodule(f"base_model.model.{name}")
                    layer.lora_A["task_0"].weight.copy_(layer.lora_A["task_0"].weight.flip(1) * 9)
        assert H.differ(H.run(used, batch()), H.run(fresh, batch()), 1e-6) == (module is ref)


def test_expert_replaced(lib, saved, tmp_path):
    """By another checkpoint, loaded or hot-swapped into it."""
    from minipeft.compat.hotswap import hotswap_adapter

    folder = expert(lib, tmp_path, "new", 24)
    want = H.run(create(lib, ([folder, *saved[0][1:]], saved[1]), use_gks=True), batch())
    for replace in (lambda model: model.load_adapter(folder, "task_0"), lambda m: hotswap_adapter(m, folder, "task_0")):
        ours = create(lib, saved, use_gks=True)
        assert H.differ(H.run(ours, batch()), want, 1e-2)
        replace(ours)
        H.identical(H.run(ours, batch()), want)


def test_experts_of_other_ranks(ref, lib, saved, tmp_path):
    """What the formula gives; peft stacks the factors, and cannot."""
    folder = expert(lib, tmp_path, "new", 3, r=3)
    theirs, ours = both(ref, lib, saved, top_k=4)
    for model in (theirs, ours):
        model.load_adapter(folder, "new")
    with pytest.raises(RuntimeError, match="stack"):
        H.run(theirs, batch())
    ours = ours.double()
    layer = ours.get_submodule("base_model.model.square")
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    experts = [layer.adapters[name] for name in ("task_0", "task_1", "task_2", "task_3", "new")]
    P = torch.stack([torch.linalg.svd((e.lora_B.weight @ e.lora_A.weight).float())[2][0] for e in experts])
    drawn = layer.adapters["arrow_router"].prototypes(experts, [])
    assert (drawn.float() * P).sum(1).abs().min() > 0.9  # 15 steps are not yet the singular vector
    score = (x @ drawn.T).abs()
    score[score < score.sort(-1, descending=True).values[..., 3:4]] = -torch.inf
    c = score.softmax(-1)
    want = sum(c[..., i, None] * e.scaling * (x @ e.lora_A.weight.T @ e.lora_B.weight.T) for i, e in enumerate(experts))
    H.close({"y": layer(x).detach()}, {"y": (layer.base_layer(x) + want).detach()}, 1e-12)
    model = create(lib, saved, use_gks=True)
    model.load_adapter(folder, "new")
    with pytest.raises(lib.ConfigError, match=r"one rank, but on 'square' they have \[2, 3\]"):
        H.run(model, batch())


# ------------------------------------------------------------------------------------- what running does not change
def test_running_writes_nothing(ref, lib, saved):
    """peft subtracts the general experts in place, so an expert alone is another one after the router's first run."""
    for module in (ref, lib):
        model = create(module, saved, use_gks=True)
        before = H.snapshot(model)
        H.run(model, batch())
        after = {name: torch.equal(t, before[name]) for name, t in model.state_dict().items()}
        assert [n for n, same in after.items() if not same and "task_" not in n] == []
        assert all(after.values()) == (module is lib)


def test_copies(lib, saved):
    ours = create(lib, saved, use_gks=True)
    want = H.run(ours, batch())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        H.identical(H.run(other, batch()), want)


def test_first_run_in_inference_mode(lib, saved):
    """What it computes for later can be used in training."""
    ours = create(lib, saved)
    with torch.inference_mode():
        want = ours(**batch())
    x = {k: v.requires_grad_() for k, v in batch().items()}
    y = ours(**x)
    y.sum().backward()
    assert torch.equal(y, want) and x["x"].grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------ merging
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused(safe, ref, lib, saved):
    theirs, ours = both(ref, lib, saved)
    want, before = H.run(ours, batch()), H.snapshot(ours)
    for model, error in ((theirs, RuntimeError), (ours, lib.MergeError)):
        with pytest.raises(error, match="Arrow"):
            model.merge_adapter(safe_merge=safe)
    with pytest.raises(lib.MergeError):
        ours.merge_and_unload(safe_merge=safe)
    H.identical(H.snapshot(ours), before)
    H.identical(H.run(ours, batch()), want)


def test_expert_merged(lib, saved):
    """An expert in the weights is still chosen from, as one that is active besides. (peft runs no router then.)"""
    ours = create(lib, saved, dtype=torch.float64)
    ours.base_model.set_adapter(["arrow_router", "task_1"])
    want = H.run(ours, batch(torch.float64))
    ours.merge_adapter(adapter_names=["task_1"])
    H.close(H.run(ours, batch(torch.float64)), want, 1e-10)


def test_unload(lib, saved):
    H.identical(create(lib, saved, use_gks=True).unload().state_dict(), B.MLP_2D.build().state_dict())


def test_combining(lib, saved):
    """Experts combine into a further expert; a router has nothing to combine."""
    ours = create(lib, saved)
    with pytest.raises(lib.UnsupportedFeatureError, match="Arrow adapters do not add up"):
        ours.add_weighted_adapter(["arrow_router", "task_0"], [1.0, 1.0], "sum")
    before = H.run(ours, batch())
    ours.add_weighted_adapter(["task_0", "task_1"], [3.0, -4.0], "sum", combination_type="linear")
    assert H.differ(H.run(ours, batch()), before, 1e-3)


# ------------------------------------------------------------------------------------------------------------- files
def test_saved_files(ref, lib, saved, tmp_path):
    """Names, tensors and configurations of all adapters are peft's. (peft's are saved before they run.)"""
    for model, folder in zip(both(ref, lib, saved, use_gks=True), ("theirs", "ours")):
        model.save_pretrained(str(tmp_path / folder))
    names = [{p.name for p in (tmp_path / folder).iterdir()} for folder in ("theirs", "ours")]
    assert names[0] - names[1] <= {"README.md"} and {"arrow_router", "gks_1", "task_3"} <= names[1]
    for name in names[1] - {"README.md"}:
        theirs, ours = (H.stored(tmp_path / folder / name) for folder in ("theirs", "ours"))
        drawn = [key for key in ours[0] if name == "arrow_router" and "lora_A" in key]
        H.identical({**ours[0], **{key: theirs[0][key] for key in drawn}}, theirs[0])
        H.same_config(ours[1], theirs[1])


def test_router_loaded_with_its_experts(ref, lib, saved, tmp_path):
    """From the folder that peft writes. peft itself cannot load it: the names of the experts get lost."""
    theirs, ours = both(ref, lib, saved, use_gks=True)
    theirs.save_pretrained(str(tmp_path))
    loaded = []
    for module in (ref, lib):
        model = module.PeftModel.from_pretrained(B.MLP_2D.build(), str(tmp_path / "task_0"), adapter_name="task_0")
        for name in ("task_1", "task_2", "task_3", "gks_0", "gks_1"):
            model.load_adapter(str(tmp_path / name), name)
        loaded.append(model)
    with pytest.raises(AttributeError):
        loaded[0].load_adapter(str(tmp_path / "arrow_router"), "arrow_router")
    loaded[1].load_adapter(str(tmp_path / "arrow_router"), "arrow_router")
    loaded[1].set_adapter("arrow_router")
    want = H.run(theirs, batch())
    H.close(H.run(loaded[1], batch()), want, H.TOLERANCE[torch.float32])
    H.identical(H.run(loaded[1], batch()), H.run(ours, batch()))


def test_loading_again_from_what_was_saved(lib, saved, tmp_path):
    """Saved after running, created anew: the same. In peft the general experts would be subtracted twice."""
    ours = create(lib, saved, use_gks=True)
    want = H.run(ours, batch())
    ours.save_pretrained(str(tmp_path))
    again = [[str(tmp_path / f"{kind}_{i}") for i in range(n)] for kind, n in (("task", 4), ("gks", 2))]
    H.identical(H.run(create(lib, again, use_gks=True), batch()), want)


def test_folders(ref, lib, saved, tmp_path):
    """A subfolder for all, and path objects here."""
    for i, folder in enumerate(saved[0]):
        shutil.copytree(folder, tmp_path / str(i) / "deep")
    config = {"top_k": 2, "rng_seed": 5}
    outputs = [H.run(create(lib, saved), batch())]
    for module, kind in ((ref, str), (lib, str), (lib, lambda path: path)):
        model = module.create_arrow_model(B.MLP_2D.build(), [kind(tmp_path / str(i) / "deep") for i in range(4)],
                                          module.ArrowConfig(**config))
        outputs.append(H.run(model, batch()))
    paths = [str(tmp_path / str(i)) for i in range(4)]
    model = lib.create_arrow_model(B.MLP_2D.build(), paths, lib.ArrowConfig(**config), subfolder="deep")
    outputs.append(H.run(model, batch()))
    for out in outputs[1:]:
        H.close(out, outputs[0], H.TOLERANCE[torch.float32])


# ------------------------------------------------------------------------------------------------------ kinds of layer
@pytest.mark.parametrize("base", [B.HF_CONV1D, B.LLAMA], ids=lambda base: base.name)
def test_transformers(base, ref, lib, tmp_path):
    pytest.importorskip("transformers")
    llama = base is B.LLAMA
    given = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} if llama else {"fan_in_fan_out": True}
    folders = [expert(lib, tmp_path, f"task{i}", i, base, **given) for i in range(3)]
    outputs = []
    for module in (ref, lib):
        model = create(module, (folders, None), base.build(torch.float32))
        outputs.append(H.run(model, base.inputs()))
        assert type(model).__name__ == ("PeftModelForCausalLM" if llama else "PeftModel")
    H.close(outputs[1], outputs[0], H.TOLERANCE[torch.float32])


def test_four_bits(ref, lib, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def build():
        H.seed(0)
        model = nn.Sequential()
        model.add_module("wide", bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32))
        return model.to("cpu")

    def folder(i):
        H.seed(i)
        config = lib.LoraConfig(target_modules=["wide"], r=3, init_lora_weights=False)
        lib.get_peft_model(build(), config).save_pretrained(str(tmp_path / str(i)))
        return str(tmp_path / str(i))

    folders, x = [folder(i) for i in range(3)], {"input": torch.randn(2, 5, 64)}
    outputs = [H.run(create(module, (folders, None), build()), x) for module in (ref, lib)]
    H.close(outputs[1], outputs[0], H.TOLERANCE[torch.float32])


# ------------------------------------------------------------------------------------------------------------- errors
UNLIKE = {  # changes to one of the experts: what peft raises, and what it says here
    "rank": ({"r": 3}, ValueError, "'task_1' has rank 3 on 'square', and 'task_0' has 2"),
    "rank of a layer": ({"rank_pattern": {"square": 3}}, RuntimeError, "'task_1' has rank 3 on 'square'"),
    "target modules": ({"target_modules": ["wide"]}, ValueError, r"'task_1' targets \['wide'\], and 'task_0'"),
    "dora": ({"use_dora": True}, None, "'task_1' on 'square' is DoRA"),
    "lora_bias": ({"lora_bias": True}, None, "'task_1' on 'square' is LoRA with `lora_bias`"),
}


@pytest.mark.parametrize("changes, error, said", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("general", [False, True])
def test_unlike_experts(changes, error, said, general, ref, lib, saved, tmp_path):
    """Refused, and the base model is as it was. peft runs those that are not plain LoRA as if they were."""
    folder = expert(lib, tmp_path, "unlike", 2, **changes)
    paths = ([saved[0][0]], [folder]) if general else ([saved[0][0], folder], saved[1])
    if error is not None:
        with pytest.raises(error):
            H.run(create(ref, paths, top_k=1, use_gks=general), batch())
    base = B.MLP_2D.build().train()
    base.wide.eval()
    base.wide.bias.requires_grad_(False)
    before, config = H.snapshot(base), lib.ArrowConfig(top_k=1, use_gks=general)
    said = said.replace("task_1", "gks_0" if general else "task_1")
    with pytest.raises(lib.PeftError, match=said):
        lib.create_arrow_model(base, paths[0], config, paths[1])
    H.identical(H.snapshot(base), before)
    assert type(base.square) is nn.Linear and base.training and not base.wide.training
    assert [n for n, p in base.named_parameters() if not p.requires_grad] == ["wide.bias"]
    assert config.task_adapter_names is None and config.gks_adapter_names is None


KINDS = {
    "conv2d": (B.CONV2D, {"target_modules": ["first", "point"]}),
    "embedding": (B.EMBEDDING, {"target_modules": ["emb", "lin"]}),  # peft leaves out its part on the embedding
    "attention": (B.ATTENTION, {"target_modules": ["attn"]}),
}


@pytest.mark.parametrize("base, changes", KINDS.values(), ids=KINDS)
def test_layers_that_are_not_linear(base, changes, ref, lib, tmp_path):
    folders = [expert(lib, tmp_path, str(i), i, base, **changes) for i in range(2)]
    if base is not B.EMBEDDING:
        with pytest.raises(TypeError, match="Linear-like"):
            create(ref, (folders, None), base.build())
    model = base.build()
    with pytest.raises(lib.UnsupportedLayerError, match=r"Arrow cannot adapt '(first|emb|attn)'"):
        create(lib, (folders, None), model)
    assert list(model.state_dict()) == list(base.build().state_dict())


def test_bad_arguments(ref, lib, saved, tmp_path):
    tasks, generals = saved
    shutil.copytree(tasks[1], tmp_path / "nan")
    shutil.copytree(tasks[1], tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").unlink()
    path = tmp_path / "nan" / "adapter_model.safetensors"
    broken = {k: v.fill_(float("nan")) for k, v in H.read(path).items()}
    safetensors.torch.save_file(broken, path)
    bad = [  # paths, fields, whether peft refuses it, too
        (([], None), {}, True),
        ((None, None), {}, True),
        ((tasks[0], None), {"top_k": 1}, True),
        ((tasks, None), {"use_gks": True}, True),
        ((tasks, []), {"use_gks": True}, True),
        ((tasks, generals[0]), {"use_gks": True}, True),
        ((tasks[:2], None), {"top_k": 3}, True),
        (([tasks[0], str(tmp_path / "empty")], None), {"top_k": 1}, True),
        (([str(tmp_path / "empty"), tasks[0]], None), {"top_k": 1}, True),
        (([tasks[0], str(tmp_path / "nan")], None), {"top_k": 1}, False),
        (([tasks[0], str(tmp_path / "nowhere" / "at" / "all")], None), {"top_k": 1}, None),  # asks the hub
    ]
    for paths, fields, refused in bad:
        base = B.MLP_2D.build()
        with pytest.raises(lib.PeftError) as raised:
            create(lib, paths, base, **fields)
        assert isinstance(raised.value, ValueError) and str(raised.value)
        H.identical(H.snapshot(base), H.snapshot(B.MLP_2D.build()))
        assert all(p.requires_grad for p in base.parameters())
        if refused:
            with pytest.raises((ValueError, TypeError, RuntimeError, OSError)):
                H.run(create(ref, paths, **fields), batch())


def test_config_of_another_kind(lib, saved):
    with pytest.raises(lib.ConfigTypeError, match="must be an ArrowConfig, got LoraConfig"):
        lib.create_arrow_model(B.MLP_2D.build(), saved[0], lib.LoraConfig())


def test_router_of_a_kind_that_cannot_be(lib):
    for changes in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(lib.ConfigError):
            lib.get_peft_model(B.MLP.build(), lib.LoraConfig(target_modules=["wide"], arrow_config={}, **changes))


def test_expert_that_is_not_plain_added_later(lib, saved, tmp_path):
    ours = create(lib, saved)
    ours.load_adapter(expert(lib, tmp_path, "dora", 3, use_dora=True), "dora")
    with pytest.raises(lib.UnsupportedFeatureError, match="'dora' on 'square' is DoRA"):
        H.run(ours, batch())
    ours.delete_adapter("dora")
    H.run(ours, batch())


def test_general_expert_missing(lib, saved):
    ours = create(lib, saved, use_gks=True)
    ours.delete_adapter("gks_1")
    with pytest.raises(lib.AdapterNameError, match="general expert 'gks_1', which 'square' lacks"):
        H.run(ours, batch())


def test_hub_ids(lib):
    """user/repo, and what follows is a folder inside."""
    from minipeft.methods.lora.arrow import place

    assert place("user/repo") == {"model_id": "user/repo"}
    assert place("user/repo/a/b") == {"model_id": "user/repo", "subfolder": "a/b"}
    assert place("/no/such/folder/here") == {"model_id": "/no/such/folder/here"}


def test_config(ref, lib):
    for fields in ({"top_k": 0}, {"top_k": -1}, {"router_temperature": 0.0}):
        for module in (ref, lib):
            with pytest.raises(ValueError):
                module.ArrowConfig(**fields)
