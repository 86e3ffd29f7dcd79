"""LoRA on mixture-of-experts models by the names that layers had before transformers 5: configurations and files."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from . import harness as H

transformers = pytest.importorskip("transformers", minversion="5")
SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
OLD = {"mixtral": ["w1", "w2", "w3"], "phimoe": ["w1", "w2", "w3"]}  # of the others gate_proj, down_proj, up_proj
FAMILIES = {  # class, sizes, where the experts were
    "mixtral": ("Mixtral", {"num_key_value_heads": 1, "num_local_experts": 3}, "block_sparse_moe"),
    "qwen3_moe": ("Qwen3Moe", {"num_key_value_heads": 1, "head_dim": 4, "num_experts": 3, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 4}, "mlp"),
    "deepseek_v3": ("DeepseekV3", {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4,
                                   "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 4,
                                   "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
                                   "num_key_value_heads": 2}, "mlp"),
    "qwen2_moe": ("Qwen2Moe", {"num_key_value_heads": 1, "num_experts": 3, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4}, "mlp"),
    "phimoe": ("Phimoe", {"num_key_value_heads": 1, "num_local_experts": 3}, "block_sparse_moe"),
}  # fmt: skip
RENAMED = ["mixtral", "qwen3_moe", "deepseek_v3"]  # whose configurations peft translates
X = {"input_ids": torch.arange(10).view(2, 5) * 3}
TARGETS = {
    "all": lambda old: [*old, "q_proj", "q_a_proj"],
    "all-linear": lambda old: "all-linear",
    "gate": lambda old: ["gate", "o_proj"],
    "regex": lambda old: rf".*\.(o_proj|{'|'.join(old)})",
    "paths": lambda old: [f"experts.{name}" for name in old],
    "none of them": lambda old: ["o_proj"],
    "only parameters": lambda old: None,
}


def build(family):
    name, sizes, _ = FAMILIES[family]
    H.seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # far enough from zero that every expert can be seen in the output
            p.copy_(torch.randn(p.shape) / 2)
    return model


def old_names(family):
    return OLD.get(family, ["gate_proj", "down_proj", "up_proj"])


def pair(ref, lib, family, **fields):
    """An adapter with moved values in both."""
    models = [module.get_peft_model(build(family), module.LoraConfig(r=2, **fields)) for module in (ref, lib)]
    for model in models:
        H.move(model.eval(), 0.3)
    return models


def logits(model):
    with torch.no_grad():
        return model(**X).logits


def alike(ours, theirs):
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def former_file(path, family, lib, names=(), r=2, layers=(1,), **fields):
    """An adapter as it was saved under transformers 4: o_proj, the router and each layer of each expert."""
    _, sizes, place = FAMILIES[family]
    old, inner = old_names(family), sizes.get("moe_intermediate_size", SIZES["intermediate_size"])
    experts = next(sizes[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in sizes)
    hidden = SIZES["hidden_size"]
    o_in = build(family).model.layers[1].self_attn.o_proj.in_features
    shapes = {"self_attn.o_proj": (hidden, o_in)}
    for expert in range(experts):
        for name in old:
            shapes[f"{place}.experts.{expert}.{name}"] = (hidden, inner) if name == old[1] else (inner, hidden)
    if family in RENAMED:
        shapes[f"{place}.gate"] = (experts, hidden)
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for layer in layers:
        for name, (out, size) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(r, size, generator=generator) / 3
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, r, generator=generator) / 3
    targets = ["o_proj", *old, *(["gate"] if family in RENAMED else [])]
    config = {"target_modules": targets, "lora_alpha": 6, "layers_to_transform": None, **fields}
    path.mkdir(exist_ok=True)
    lib.LoraConfig(r=r, task_type="CAUSAL_LM", **config).save_pretrained(path)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return tensors


def both_layers(family):
    return (1,) if family == "deepseek_v3" else (0, 1)


# ------------------------------------------------------------------------------------------------------ configuration
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", RENAMED)
def test_same_adapter(family, targets, ref, lib, tmp_path):
    fields = {"target_modules": TARGETS[targets](old_names(family)), "lora_alpha": 6}
    if targets == "only parameters":
        fields["target_parameters"] = ["experts.down_proj"]
    if targets == "regex":
        fields["exclude_modules"] = ["layers.0.self_attn.o_proj"]
    theirs, ours = pair(ref, lib, family, **fields)
    shapes = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours)]
    assert list(shapes[1].items()) == list(shapes[0].items())
    H.copy_values(theirs, ours)
    alike(ours, theirs)
    (want, told), (got, said) = (H.saved(m, tmp_path / n) for m, n in ((theirs, "theirs"), (ours, "ours")))
    H.identical(got, want)
    H.same_config(said, told)
    for module, folder in ((ref, "ours"), (lib, "theirs")):  # and each reads the other's
        loaded = module.PeftModel.from_pretrained(build(family), tmp_path / folder)
        H.identical(module.get_peft_model_state_dict(loaded), want)
        alike(loaded.eval(), theirs)


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe"])
def test_others_stay_as_they_are(family, ref, lib):
    for targets in ("all-linear", ["q_proj", *old_names(family)]):
        theirs, ours = pair(ref, lib, family, target_modules=targets)
        H.same_names(ours.state_dict(), theirs.state_dict())
        assert ours.peft_config["default"].target_parameters is theirs.peft_config["default"].target_parameters is None


@pytest.mark.parametrize("method", ["LoHaConfig", "OFTConfig", "IA3Config", "VeraConfig"])
def test_other_methods_stay_as_they_are(method, ref, lib):
    fields = {"oft_block_size": 2} if method == "OFTConfig" else {}
    if method == "IA3Config":
        fields["feedforward_modules"] = []
    for targets in ("all-linear", ["q_proj", "w1", "w2", "w3"]):
        configs = [getattr(module, method)(target_modules=targets, **fields) for module in (ref, lib)]
        theirs, ours = (m.get_peft_model(build("mixtral"), c) for m, c in zip((ref, lib), configs))
        H.same_names(ours.state_dict(), theirs.state_dict())
        H.same_config({"target_modules": configs[1].target_modules}, {"target_modules": configs[0].target_modules})


@pytest.mark.parametrize("family,targets,lacks", [
    ("mixtral", ["q_proj", "w1"], "w1 without w3"),
    ("mixtral", ["experts.w3", "w2"], "w3 without w1"),
    ("mixtral", r".*\.(q_proj|w1)", "w1 without w3"),
    ("deepseek_v3", ["up_proj", "down_proj"], "up_proj without gate_proj"),
])  # fmt: skip
def test_one_of_two_that_are_one_parameter(family, targets, lacks, ref, lib, is_ref):
    with pytest.raises(ValueError, match="Cannot convert"):
        ref.get_peft_model(build(family), ref.LoraConfig(target_modules=targets))
    if is_ref:
        return
    config, model = lib.LoraConfig(target_modules=targets), build(family)
    before, names = copy.deepcopy(config), set(model.state_dict())
    with pytest.raises(lib.ConfigError, match=lacks):
        lib.get_peft_model(model, config)
    assert config == before and set(model.state_dict()) == names


def test_no_names_at_all(lib, is_ref):
    """peft refuses to take the default of Mixtral, which it has."""
    if is_ref:
        pytest.skip("peft fails")
    config = lib.LoraConfig()
    lib.get_peft_model(build("mixtral"), config)
    assert config.target_modules == {"q_proj", "v_proj"} and config.target_parameters is None


def test_models_that_are_not_of_transformers(lib, is_ref):
    """One that calls itself Mixtral keeps its layers, and nothing imports transformers for it."""
    if is_ref:
        pytest.skip("peft takes it for transformers' Mixtral")
    code = """
from torch import nn
model = nn.ModuleDict({"w1": nn.Linear(2, 2), "gate": nn.Linear(2, 2)})
model.config = {"model_type": "mixtral"}
config = lib.LoraConfig(target_modules=["w1", "gate"])
lib.get_peft_model(model, config)
assert config.target_modules == {"w1", "gate"} and config.target_parameters is None and not config.rank_pattern
"""
    build("mixtral")  # now all that there is to import is there
    exec(code, {"lib": lib})
    around = f"import sys, {lib.__name__} as lib\n{code}\nassert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", around], check=True)


# -------------------------------------------------------------------------------------------------------------- a life
def test_a_second_adapter_merging_and_unloading(ref, lib):
    fields = {"target_modules": ["q_proj", "w1", "w2", "w3"], "lora_alpha": 6}
    theirs, ours = pair(ref, lib, "mixtral", **fields)
    for module, model in ((ref, theirs), (lib, ours)):
        model.add_adapter("other", module.LoraConfig(r=3, **fields))
        model.set_adapter("other")
        H.move(model, 0.3)
    H.copy_values(theirs, ours)
    assert ours.peft_config["other"].rank_pattern == theirs.peft_config["other"].rank_pattern
    before = {}
    for name in ("default", "other"):
        for model in (theirs, ours):
            model.set_adapter(name)
        alike(ours, theirs)
        before[name] = logits(ours)
    assert not torch.allclose(before["default"], before["other"])
    plain = H.snapshot(build("mixtral"))
    for name, want in before.items():
        ours.set_adapter(name)
        ours.merge_adapter()
        torch.testing.assert_close(logits(ours), want, rtol=1e-4, atol=1e-4)
        ours.unmerge_adapter()
        torch.testing.assert_close(logits(ours), want, rtol=1e-4, atol=1e-4)
    H.identical(H.snapshot(copy.deepcopy(ours).unload()), plain)
    torch.testing.assert_close(logits(ours.merge_and_unload()), before["other"], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- checkpoint
@pytest.mark.parametrize("family", [*RENAMED, "qwen2_moe"])
def test_files_of_transformers_4(family, ref, lib, tmp_path):
    """As in peft, and in the weights what each layer of each expert had."""
    fields = {}
    if family not in RENAMED:  # peft translates the file alone, so the configuration has to name the parameters
        fields = {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"],
                  "rank_pattern": {"gate_up_proj": 4}, "alpha_pattern": {"gate_up_proj": 12}}  # fmt: skip
    if family == "deepseek_v3":  # the first of its layers has no experts
        fields["exclude_modules"] = ["layers.0.self_attn.o_proj"]
    tensors = former_file(tmp_path, family, lib, layers=both_layers(family), **fields)
    theirs, ours = (module.PeftModel.from_pretrained(build(family), tmp_path).eval() for module in (ref, lib))
    H.identical(lib.get_peft_model_state_dict(ours), ref.get_peft_model_state_dict(theirs))
    alike(ours, theirs)
    assert not torch.allclose(logits(ours), logits(build(family)))

    fresh = lib.get_peft_model(build(family), lib.LoraConfig.from_pretrained(tmp_path))  # into one that is there
    report = lib.set_peft_model_state_dict(fresh, tensors)
    assert not report.missing_keys and not report.unexpected_keys
    H.identical(lib.get_peft_model_state_dict(fresh), lib.get_peft_model_state_dict(ours))

    (first, down, second), place = old_names(family), FAMILIES[family][2]
    plain, merged = build(family), ours.merge_and_unload()
    for layer in both_layers(family):
        now, then = merged.model.layers[layer].mlp, plain.model.layers[layer].mlp

        def delta(name, start=f"base_model.model.model.layers.{layer}.{place}"):
            key = f"{start}.{name}"
            return 3 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]

        for e in range(len(then.experts.down_proj)):
            joined = torch.cat([delta(f"experts.{e}.{first}"), delta(f"experts.{e}.{second}")])
            torch.testing.assert_close(now.experts.gate_up_proj[e] - then.experts.gate_up_proj[e], joined)
            down_now = now.experts.down_proj[e] - then.experts.down_proj[e]
            torch.testing.assert_close(down_now, delta(f"experts.{e}.{down}"))
        if family in RENAMED:
            torch.testing.assert_close(now.gate.weight - then.gate.weight, delta("gate"))


def test_more_than_ten_experts_keep_their_order(ref, lib, tmp_path, monkeypatch):
    name, sizes, place = FAMILIES["qwen3_moe"]
    monkeypatch.setitem(FAMILIES, "qwen3_moe", (name, {**sizes, "num_experts": 12}, place))
    former_file(tmp_path, "qwen3_moe", lib, layers=(0, 1))
    theirs, ours = (module.PeftModel.from_pretrained(build("qwen3_moe"), tmp_path) for module in (ref, lib))
    H.identical(lib.get_peft_model_state_dict(ours), ref.get_peft_model_state_dict(theirs))


def test_one_parameter_of_two(lib, is_ref, tmp_path):
    """w1 and w3 alone: their parameter's is then the only adapter of the experts, under another key."""
    if is_ref:
        pytest.skip("peft takes both parameters for adapted, and leaves the factors out")
    tensors = former_file(tmp_path, "mixtral", lib, layers=(0, 1))
    tensors = {key: t for key, t in tensors.items() if ".w1." in key or ".w3." in key}
    lib.LoraConfig(r=2, lora_alpha=6, target_modules=["w1", "w3"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merged, plain = lib.PeftModel.from_pretrained(build("mixtral"), tmp_path).merge_and_unload(), build("mixtral")
    start = "base_model.model.model.layers.1.block_sparse_moe.experts.2"
    B, A = ([tensors[f"{start}.{name}.lora_{slot}.weight"] for name in ("w1", "w3")] for slot in "BA")
    delta = merged.model.layers[1].mlp.experts.gate_up_proj - plain.model.layers[1].mlp.experts.gate_up_proj
    torch.testing.assert_close(delta[2], 3 * torch.cat([B[0] @ A[0], B[1] @ A[1]]))


def test_shared_experts_of_old(ref, lib, is_ref, tmp_path):
    """peft leaves out what a file has of DeepSeek's shared experts; here that is an error unless it is asked for."""
    if is_ref:
        pytest.skip("peft says nothing")
    tensors = former_file(tmp_path, "deepseek_v3", lib, exclude_modules=["layers.0.self_attn.o_proj"])
    start = "base_model.model.model.layers.1.mlp.shared_experts.up_proj"
    more = {f"{start}.lora_A.weight": torch.ones(2, 8), f"{start}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors | more, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    theirs = ref.PeftModel.from_pretrained(build("deepseek_v3"), tmp_path)
    with pytest.raises(lib.CheckpointError, match="shared_experts"):
        lib.PeftModel.from_pretrained(build("deepseek_v3"), tmp_path)
    ours = lib.get_peft_model(build("deepseek_v3"), lib.LoraConfig.from_pretrained(tmp_path))
    lib.set_peft_model_state_dict(ours, tensors | more, strict=False)
    H.identical(lib.get_peft_model_state_dict(ours), ref.get_peft_model_state_dict(theirs))


def test_modules_that_moved(ref, lib, tmp_path):
    """The language model of Llava had another path in transformers 4."""

    def llava():
        text = transformers.LlamaConfig(**SIZES)
        seen = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **{**SIZES, "num_hidden_layers": 1})
        config = transformers.LlavaConfig(text_config=text, vision_config=seen, image_token_index=5)
        return transformers.LlavaForConditionalGeneration(config)

    lib.LoraConfig(r=2, target_modules=["o_proj"]).save_pretrained(tmp_path)
    start = "base_model.model.language_model.model.layers.{}.self_attn.o_proj.lora_{}.weight"
    shapes = {"A": (2, 8), "B": (8, 2)}
    tensors = {start.format(layer, slot): torch.randn(shapes[slot]) for layer in (0, 1) for slot in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    got, want = (m.get_peft_model_state_dict(m.PeftModel.from_pretrained(llava(), tmp_path)) for m in (lib, ref))
    H.identical(got, want)
    assert {key.replace("model.language_model.", "language_model.model.") for key in got} == {*tensors}


def lacking_an_expert(tensors):
    return {key: t for key, t in tensors.items() if ".experts.1." not in key}


def lacking_a_layer(tensors):
    return {key: t for key, t in tensors.items() if ".w3." not in key}


def of_uneven_rank(tensors):
    return {key: t[:1] if ".experts.1.w1.lora_A" in key else t for key, t in tensors.items()}


def with_nan(tensors):
    return {key: t * float("nan") if ".experts.1.w1.lora_A" in key else t for key, t in tensors.items()}


def said_twice(tensors):
    """The factors of the parameter beside those of its layers."""
    start = "base_model.model.model.layers.0.mlp.experts.base_layer"
    return tensors | {f"{start}.lora_A.weight": torch.ones(12, 8), f"{start}.lora_B.weight": torch.ones(24, 12)}


def under_two_names(tensors):
    start = "base_model.model.model.layers.0.mlp.experts.gate_up_proj"
    return tensors | {f"{start}.lora_A.weight": torch.ones(12, 8), f"{start}.lora_B.weight": torch.ones(24, 12)}


SPOILT = [lacking_an_expert, lacking_a_layer, of_uneven_rank, with_nan, said_twice, under_two_names]


@pytest.mark.parametrize("spoil", SPOILT)
def test_spoiled_files(spoil, lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft says nothing, or something of torch's")
    tensors = former_file(tmp_path, "mixtral", lib, layers=(0, 1))
    save_file({k: t.contiguous() for k, t in spoil(tensors).items()}, tmp_path / "adapter_model.safetensors")
    model = build("mixtral")
    names = set(model.state_dict())
    with pytest.raises(lib.CheckpointError, match="experts"):
        lib.PeftModel.from_pretrained(model, tmp_path)
    assert set(model.state_dict()) == names


def test_the_configuration_on_disk_stays(lib, tmp_path):
    """Loading translates what is in memory."""
    former_file(tmp_path, "mixtral", lib, layers=(0, 1))
    before = json.loads((tmp_path / "adapter_config.json").read_text())
    lib.PeftModel.from_pretrained(build("mixtral"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == before
