"""What code reads and imports from inside peft, and what peft says when something is out of the ordinary."""

import importlib
import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from minipeft import compat
from minipeft.compat import helpers, inside, intruders, kappa
from minipeft.compat import set_peft_model_state_dict as set_as_peft
from minipeft.core.layer import Layer

from . import harness as H
from .cases import CASES, each_case

OF_EACH = [next(c for c in CASES if c.method == m) for m in dict.fromkeys(c.method for c in CASES)]
PATHS = [f"{m}.layers.{i}.{p}" for m in ("model", "vision") for i in range(3) for p in ("attn.q", "attn.k", "mlp.up")]


def net(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))


def inner(ref, path):
    return importlib.import_module(f"{ref.__name__}.{path}")


# --------------------------------------------------------------------------------------------------------- functions
FIELDS = [
    {"target_modules": ["q", "up"]},
    {"target_modules": ["attn.q"]},
    {"target_modules": r".*\.up"},
    {"target_modules": ["k"], "exclude_modules": ["vision.layers.0.attn.k"]},
    {"target_modules": ["q", "k"], "exclude_modules": r"vision.*"},
    {"target_modules": ["q"], "layers_to_transform": [1]},
    {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"target_modules": ["q"], "modules_to_save": ["attn"]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_which_modules_are_meant(fields, lib, ref):
    theirs = inner(ref, "tuners.tuners_utils").check_target_module_exists
    for path in [*PATHS, "q", "xq", "q.up"]:
        want = bool(theirs(ref.LoraConfig(**fields), path))
        assert inside.check_target_module_exists(lib.LoraConfig(**fields), path) == want, path


def test_inspect_matched_modules(lib):
    model = lib.get_peft_model(net(4, 5, 6, 3), lib.LoraConfig(target_modules=["0", "2"]))
    for given in (model, model.base_model):
        assert inside.inspect_matched_modules(given) == {"matched": ["0", "2"], "unmatched": ["", "1"]}


@pytest.mark.parametrize("wanted", [PATHS[:3], PATHS[::3], PATHS[1::9], PATHS[:9], ["a.b", "c.b"], PATHS])
def test_find_minimal_target_modules(wanted, lib, ref):
    others = [path for path in [*PATHS, "b"] if path not in wanted]
    names = inside._find_minimal_target_modules(wanted, others)
    assert names == inner(ref, "tuners.tuners_utils")._find_minimal_target_modules(wanted, others)
    for bad in ([], "q", ["q", ""], [others[0]]):
        with pytest.raises(lib.ConfigError):
            inside._find_minimal_target_modules(bad, others)


def test_all_linear(lib):
    config = lib.LoraConfig(target_modules="all-linear")
    assert inside._maybe_include_all_linear_layers(config, net(4, 5, 6)).target_modules == {"0", "1"}
    config = lib.LoraConfig(target_modules=["q"])
    assert inside._maybe_include_all_linear_layers(config, net(4, 5, 6)).target_modules == {"q"}


def test_models_without_values():
    make = inside.skip_init_on_device(lambda: net(4, 5))
    with inside.init_empty_weights():
        empty, full, norm = net(4, 5), make(), nn.BatchNorm1d(3)
    assert empty[0].weight.is_meta and norm.weight.is_meta
    assert not (norm.running_mean.is_meta or full[0].weight.is_meta or net(4, 5)[0].weight.is_meta)
    with inside.init_empty_weights(include_buffers=True):
        norm = nn.BatchNorm1d(3)
    assert norm.running_mean.is_meta and not nn.BatchNorm1d(3).running_mean.is_meta


@pytest.mark.parametrize("by", [{}, {"num_modules": 2}, {"top_p": 0.5}, {"threshold": 9.0}, {"top_p": 0.1}], ids=str)
def test_kappa_selector(by, ref):
    theirs = ref.helpers.KappaTuneSelector(net(6, 8, 9, 7, 5), show_progress=False)
    ours = kappa.KappaTuneSelector(net(6, 8, 9, 7, 5), show_progress=False)
    assert ours.get_best_targets(**by) == theirs.get_best_targets(**by)
    assert ours.get_best_target_parameters(**by) == []


def test_asa_callback_steps():
    from minipeft import AdamssConfig, get_peft_model

    model = get_peft_model(net(6, 6), AdamssConfig(target_modules=["0"], r=4, use_asa=True))
    steps = []
    model.base_model.update_and_allocate = steps.append
    callback, state = inside.AdamssAsaCallback(), type("State", (), {"global_step": 7})()
    callback.on_optimizer_step(None, state, None, model=model)
    callback.on_optimizer_step(None, state, None, model=net(2, 2))
    assert steps == [7] and callback.on_log(None, state, None) is None
    with pytest.raises(AttributeError):
        callback.nothing  # noqa: B018


@pytest.mark.parametrize("epsilon", [0.0, 0.6, 9.0])
def test_intruder_dimensions(epsilon, lib, ref):
    """The weights are peft's: on a layer where it takes all, some and none of the strongest directions away."""
    models = []
    for module, reduce in ((ref, inner(ref, "tuners.lora.intruders")), (lib, intruders)):
        base = net(12, 9)
        model = module.get_peft_model(base, module.LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
        torch.manual_seed(1)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data.normal_(0, 0.5)
        reduce.reduce_intruder_dimension(model, threshold_epsilon=epsilon, top_k=4, logging_sink=None)
        assert model.active_adapters == ["intruder_reduced"]
        models.append(model)
    deltas = [[m.base_model.model[0].get_delta_weight(n) for n in m.peft_config] for m in models]
    for want, got in zip(*deltas):
        assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(deltas[1][0], deltas[1][1]) == (epsilon == 0)


def test_intruders_need_lora(lib):
    model = lib.get_peft_model(net(4, 4), lib.MissConfig(target_modules=["0"], r=2))
    with pytest.raises(lib.UnsupportedFeatureError):
        intruders.reduce_intruder_dimension(model)


def test_intruders_of_what_cannot_be_told_apart(lib):
    """Nothing is added where the frozen weight is not what it was, or there is no such adapter."""
    for start, name, error in (("pissa", "default", lib.UnsupportedFeatureError), (False, "none", ValueError),
                               (False, "default", lib.MergeError)):  # fmt: skip
        model = lib.get_peft_model(net(4, 4), lib.LoraConfig(target_modules=["0"], r=2, init_lora_weights=start))
        if error is lib.MergeError:
            model.merge_adapter()
        with pytest.raises(error):
            intruders.reduce_intruder_dimension(model, name)
        assert list(model.peft_config) == ["default"]


def test_dora_norms_are_kept_while_they_hold(lib):
    model = lib.get_peft_model(net(6, 8), lib.LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False))
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    cache = layer.lora_magnitude_vector["default"]._dora_cache
    model.eval()
    want = model(x)
    assert not cache
    with helpers.DoraCaching():
        assert torch.equal(model(x), want) and torch.equal(model(x), want) and len(cache) == 1
        with torch.no_grad():
            layer.lora_A["default"].weight.mul_(2)
        changed = model(x)
        assert not torch.allclose(changed, want)
        model.train()
        assert not cache and torch.allclose(model(x), changed) and not cache
    model.eval()
    assert torch.equal(model(x), changed) and not cache


# ------------------------------------------------------------------------------------------------------------- names
PAGE = Path(__file__).parents[2] / "docs" / "peer.md"
NOT_OFFERED = re.findall(r"`(peft\.[\w.]+)`", "".join(x for x in PAGE.read_text().splitlines() if x.startswith("|")))


@pytest.mark.parametrize("path", NOT_OFFERED)
def test_names_that_the_docs_say_are_not_offered(path, ref):
    """They are peft's, and importing them from what takes its place fails."""
    module, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    paths = compat.offered()
    paths |= {other: paths[home] for other, home in compat.same_as().items()}
    assert name not in paths.get(module, {})


# -------------------------------------------------------------------------------------------------------- attributes
def test_which_methods_share_state(lib, ref):
    for kind, theirs in ref.PEFT_TYPE_TO_TUNER_MAPPING.items():
        if hasattr(theirs, "uses_shared_state") and kind not in ("XLORA", "SHADOW"):  # their modules are not of layers
            assert lib.PEFT_TYPE_TO_TUNER_MAPPING[kind].uses_shared_state == theirs.uses_shared_state, kind


@each_case(lambda c: c in OF_EACH and c.method.upper() in Layer.unused)
def test_slots_of_other_layers_are_there_and_empty(case, lib, ref):
    theirs, ours = H.adapt(ref, case), H.adapt(lib, case)
    there = dict(theirs.base_model.model.named_modules())
    layers = [(name, m) for name, m in ours.base_model.model.named_modules() if isinstance(m, Layer)]
    assert layers
    for name, layer in layers:
        for slot in Layer.unused[layer.method]:
            assert ("default" in getattr(layer, slot)) == ("default" in getattr(there[name], slot)), (name, slot)


def test_a_wrapper_around_tokens_is_switched_as_a_layer(lib):
    base = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    base.get_input_embeddings = lambda: base[0]
    model = lib.get_peft_model(base, lib.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1, 2]}))
    wrapper = model.base_model.model[0]
    assert wrapper.active_adapters == ["default"] and wrapper._adapters == {"default"}
    wrapper.enable_adapters(False)
    assert wrapper.disable_adapters and model.get_model_status().enabled == "irregular"


# ---------------------------------------------------------------------------------------------------- configurations
def test_a_type_that_is_not_its_own_is_said_and_not_used(lib):
    with pytest.warns(lib.PeftWarning, match="not used"):
        assert lib.LoraConfig(peft_type="test").peft_type == "LORA"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lib.LoraConfig(peft_type="LORA")


def test_any_json_is_no_configuration(lib, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"foo": 1}))
    with pytest.raises(TypeError, match="missing required keys"):
        lib.IA3Config.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3}))
    assert lib.LoraConfig.from_pretrained(tmp_path).r == 3


def test_values_that_peft_takes(lib, tmp_path):
    assert lib.LoraConfig(init_lora_weights="OLoRA").init_lora_weights == "olora"
    config = lib.LoraConfig(init_lora_weights="corda", corda_config=lib.CordaConfig(cache_file=tmp_path / "cache"))
    config.save_pretrained(tmp_path)
    assert lib.PeftConfig.from_pretrained(tmp_path).corda_config.cache_file == str(tmp_path / "cache")


# ------------------------------------------------------------------------------------------- what peft warns of, too
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("first", [True, False])
def test_a_start_that_changes_the_base_beside_others(start, first, lib):
    starts = [start, True] if first else [True, start]
    configs = [lib.LoraConfig(target_modules=["0"], r=2, init_lora_weights=how) for how in starts]
    model = lib.get_peft_model(net(4, 4), configs[0])
    with pytest.warns(UserWarning, match="changes the base weights of the model"):
        model.add_adapter("other", configs[1])
    with pytest.warns(UserWarning, match="path_initial_model_for_weight_conversion"):
        lib.LoraConfig(init_lora_weights=start, use_rslora=True, rank_pattern={"a": 2})


@pytest.mark.parametrize(("name", "warns"), [("lora", True), ("ora_", True), ("adapter", False), ("default", False)])
def test_names_within_the_prefix(name, warns, lib):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lib.get_peft_model(net(4, 4), lib.LoraConfig(target_modules=["0"]), adapter_name=name)
    assert any("Adapter name" in str(w.message) for w in seen) == warns


@pytest.mark.parametrize("bias", [True, False])
def test_biases_that_cannot_be_merged(bias, lib):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = lib.get_peft_model(
            nn.Sequential(nn.Linear(4, 4, bias=bias)), lib.LoraConfig(target_modules=["0"], lora_bias=True)
        )
    assert any("has no bias" in str(w.message) for w in seen) != bias
    model.base_model.model[0].lora_B["default"].bias.data.fill_(1.0)
    if not bias:
        with pytest.raises(RuntimeError):
            model.merge_adapter()


def test_patterns_that_fit_nothing_are_a_runtime_warning(lib):
    with pytest.warns(RuntimeWarning, match="typo"):
        lib.get_peft_model(net(4, 4), lib.LoraConfig(target_modules=["0"], rank_pattern={"typo": 3}))


class Mamba(nn.Module):
    config = {"model_type": "mamba2"}

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)


@pytest.mark.parametrize("method", ["Lora", "LoHa", "IA3"])
def test_weights_that_kernels_read_cannot_be_adapted(method, lib):
    fields = {"feedforward_modules": []} if method == "IA3" else {}
    config = getattr(lib, f"{method}Config")
    lib.get_peft_model(Mamba(), config(target_modules=["in_proj"], **fields))
    base = Mamba()
    with pytest.raises(lib.UnsupportedLayerError, match="Mamba"):
        lib.get_peft_model(base, config(target_modules=["out_proj"], **fields))
    assert type(base.out_proj) is nn.Linear


def test_convolutions_cannot_become_lora(lib):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.conv = nn.Linear(4, 4), nn.Conv2d(4, 4, 3)

    for targets, can in ((["lin"], True), (["lin", "conv"], False)):
        model = lib.get_peft_model(Both(), lib.LoHaConfig(target_modules=targets, r=2))
        assert model.supports_lora_conversion() == can
        if not can:
            with pytest.raises(TypeError):
                lib.convert_to_lora(model, rank=2)


# -------------------------------------------------------------------------------------------------------- state dicts
def test_tensors_of_the_models_own_are_loaded_as_in_peft(lib):
    one = lib.get_peft_model(net(4, 5, 3), lib.LoraConfig(target_modules=["0"], bias="all", init_lora_weights=False))
    for p in one.parameters():
        p.data.add_(0.5) if p.requires_grad else None
    state = lib.get_peft_model_state_dict(one)
    other = lib.get_peft_model(net(4, 5, 3), lib.LoraConfig(target_modules=["0"]))
    assert not any(set_as_peft(other, state))
    x = torch.randn(2, 4)
    assert torch.equal(other(x), one(x))
    with pytest.raises(lib.CheckpointError):  # minipeft's own changes no frozen tensor
        lib.set_peft_model_state_dict(other, state)


def test_keys_of_a_state_dict_and_targeted_parameters(lib):
    """The keys do not tell a layer from its parameter; the configuration does, and each is adapted once."""
    fields = {"target_modules": ["1"], "target_parameters": ["0.weight"], "r": 2, "init_lora_weights": False}
    one, other = net(4, 4, 3), net(4, 4, 3)
    lib.inject_adapter_in_model(lib.LoraConfig(**fields), one)
    state = lib.get_peft_model_state_dict(one)
    lib.inject_adapter_in_model(lib.LoraConfig(**fields), other, state_dict=state)
    assert [*other.state_dict()] == [*one.state_dict()]
    assert not any(lib.set_peft_model_state_dict(other, state))
    x = torch.randn(2, 4)
    assert torch.equal(other(x), one(x))


IN_FSDP = [c for c in OF_EACH if c.method in ("lora", "vera", "tinylora", "vblora", "unilora", "ln_tuning", "shira")]
IN_FSDP += [c for c in CASES if c.id in ("lora/attention/plain", "lora/parameter/of_linear")]


@each_case(lambda c: c in IN_FSDP)
def test_in_fsdp(case, lib):
    """The same output, and the whole checkpoint, of methods that share tensors or positions and of special layers."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = H.move(H.adapt(lib, case), case.scale)
    want = {key: tensor.clone() for key, tensor in lib.get_peft_model_state_dict(model).items()}
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model.eval()
        y = H.run(model, H.inputs(case))
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        got = lib.get_peft_model_state_dict(wrapped)
        H.close(H.run(wrapped, H.inputs(case)), y, 1e-6)
    finally:
        dist.destroy_process_group()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_embeddings_that_were_resized_since_the_hub(lib, tmp_path, monkeypatch):
    """The size in the hub's cache counts, as that in a local folder does."""
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9}))
    there = {("org/model", "config.json"): str(tmp_path / "config.json")}
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name, revision=None: there.get((repo, name)))

    def saved(tokens, name):
        base = nn.Sequential(nn.Embedding(tokens, 4), nn.Linear(4, 4))
        base.config, base.name_or_path = type("C", (), {"vocab_size": tokens, "model_type": "x"})(), name
        base.get_input_embeddings = lambda: base[0]
        return lib.get_peft_model_state_dict(lib.get_peft_model(base, lib.LoraConfig(target_modules=["1"])))

    assert "base_model.model.0.weight" in saved(11, "org/model")
    assert "base_model.model.0.weight" not in saved(9, "org/model")
    assert "base_model.model.0.weight" not in saved(11, "org/other")
