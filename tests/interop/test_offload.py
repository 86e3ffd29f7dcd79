"""Weights that accelerate puts elsewhere between passes: every method gives the numbers that it gives without."""

import tempfile
import warnings
import zlib

import pytest
import torch
from torch import nn

from . import harness as H
from .cases import CASES

accelerate = pytest.importorskip("accelerate")

FIRST = {}
for _case in CASES:
    FIRST.setdefault((_case.method, _case.base.name), _case)
PICKED = {c.method: c for c in reversed(FIRST.values())}  # one of each method, and where weights are shared
SHARED = ("lora/targets/token_indices_tied", "trainable_tokens/llama_tied/default", "adalora/bert_seq/plain",
          "lora/t5/plain", "prompt_tuning/t5/plain", "cpt/gpt2/plain", "shadow/llama/plain", "lily/stack/shared")
_picked = {c.id: c for c in [*PICKED.values(), *(c for c in CASES if c.id in SHARED)]}
ALL = [c for c in FIRST.values() if c.id in _picked or not c.base.transformers]
each_method_and_layer = pytest.mark.parametrize("case", ALL, ids=[c.id for c in ALL])
each_picked = pytest.mark.parametrize("case", _picked.values(), ids=_picked)
CPU = torch.device("cpu")


def on_cpu(model, buffers=False):
    return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=buffers)


def on_disk(model):
    return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device=CPU)


WAYS = {"cpu": on_cpu, "buffers": lambda model: on_cpu(model, True), "disk": on_disk}


def away(model, case, turn=0):
    """The model put elsewhere; the cases take turns in how."""
    way = list(WAYS)[(zlib.crc32(case.id.encode()) + turn) % len(WAYS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WAYS[way](model)
    assert any(p.is_meta for p in model.parameters())
    return model


def adapted(lib, case, base=None):
    return H.move(H.adapt(lib, case, base), case.scale)


@each_method_and_layer
def test_adapted_model_that_is_offloaded_gives_the_same_numbers(case, lib):
    model, batch = adapted(lib, case).double(), H.inputs(case, torch.float64)
    want = H.run(model, batch)
    away(model, case)
    for _ in range(2):
        H.close(H.run(model, batch), want, H.tolerance(case, torch.float64))


@each_picked
def test_adapter_on_an_offloaded_base_has_real_tensors(case, lib):
    want = H.adapt(lib, case)
    model = H.adapt(lib, case, away(case.base.build(), case, 1))
    H.identical(*({n: p for n, p in m.named_parameters() if ".default" in n} for m in (model, want)))
    batch = H.inputs(case)
    H.close(H.run(H.move(model, case.scale), batch), H.run(H.move(want, case.scale), batch), 1e-6)


@each_picked
def test_saved_and_loaded(case, lib, tmp_path):
    model = adapted(lib, case)
    want, _ = H.saved(model, tmp_path / "plain")
    got, _ = H.saved(away(model, case), tmp_path / "offloaded")
    H.identical(got, want)
    base = away(case.base.build(), case, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = lib.PeftModel.from_pretrained(base, str(tmp_path / "plain")).eval()
    H.close(*(H.weighable(case, H.run(m, H.inputs(case))) for m in (again, model)), 1e-6)
    other = {k: v * 0.9 if v.is_floating_point() else v for k, v in want.items()}
    if any(getattr(m, "computed", False) for m in model.modules()):  # its network is not saved
        return
    lib.set_peft_model_state_dict(model, other)
    H.close(H.saved(model, tmp_path / "again")[0], other, 0)


mergeable = [c for c in ALL if c.merges and not c.prompt and "merge" not in c.disputed]


@pytest.mark.parametrize("case", mergeable, ids=[c.id for c in mergeable])
def test_merged_and_taken_out_again(case, lib):
    model, batch = adapted(lib, case).double(), H.inputs(case, torch.float64)
    want = H.run(model, batch)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    away(model, case)
    model.merge_adapter()
    same = H.weighable(case, want)
    H.close(H.weighable(case, H.run(model, batch)), same, H.tolerance(case, torch.float64))
    model.unmerge_adapter()
    H.close(H.run(model, batch), want, 1e-10)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    now = dict(model.named_parameters())
    H.identical({n: now[n] for n in weights}, weights)  # tied weights have come apart: there are more
    plain = away(adapted(lib, case).double(), case, 1).merge_and_unload()
    H.close(H.weighable(case, H.run(plain, batch)), same, H.tolerance(case, torch.float64))


@pytest.fixture(scope="module")
def stored_llama(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=30,
                                      num_attention_heads=2, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_base_with_layers_on_disk(stored_llama, modules_to_save, lib, tmp_path):
    """A model of transformers that is loaded with some layers on disk and some on the CPU: as one that is not."""
    from transformers import LlamaForCausalLM

    def base(**options):
        return LlamaForCausalLM.from_pretrained(stored_llama, **options)

    def parted():
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk",
                  "model.layers.1": "cpu", "model.norm": "disk", "lm_head": "disk"}
        return base(device_map=places, offload_folder=str(tmp_path / "off"))

    fields = {"target_modules": ["q_proj", "down_proj"], "r": 2, "modules_to_save": modules_to_save}
    batch = {"input_ids": torch.randint(0, 30, (2, 5))}
    H.seed(0)
    want = H.move(lib.get_peft_model(base(), lib.LoraConfig(**fields)))
    want.save_pretrained(str(tmp_path / "adapter"))
    running = H.run(want.eval(), batch)
    loaded = lib.PeftModel.from_pretrained(parted(), str(tmp_path / "adapter")).eval()
    assert any(p.is_meta for p in loaded.parameters())
    H.close(H.run(loaded, batch), running, 1e-6)
    loaded.load_adapter(str(tmp_path / "adapter"), "second")
    loaded.set_adapter("second")
    H.close(H.run(loaded, batch), running, 1e-6)
    got, _ = H.saved(loaded, tmp_path / "again", selected_adapters=["default"])
    H.identical(got, H.stored(tmp_path / "adapter")[0])
    H.seed(0)
    new = H.move(lib.get_peft_model(parted(), lib.LoraConfig(**fields)))
    got, expected = (H.gradients(m.eval(), batch) for m in (new, want))
    H.close(got, expected, 1e-5)
    H.close(H.run(loaded.merge_and_unload(), batch), running, 1e-5)


def test_adapter_dispatched_by_a_device_map(lib):
    from .cases import CASES

    case = next(c for c in CASES if c.id == "lora/linear/plain")
    model, batch = adapted(lib, case), H.inputs(case)
    want = H.run(model, batch)
    parts = [n for n, m in model.named_modules() if m._parameters]
    places = {n: ("cpu", "disk")[i % 2] for i, n in enumerate(parts)}
    accelerate.dispatch_model(model, places, CPU, offload_dir=tempfile.mkdtemp(), force_hooks=True)
    H.close(H.run(model, batch), want, 1e-6)


@each_picked
def test_second_adapter_on_an_offloaded_adapted_model(case, lib):
    if case.second is None or case.prompt or "peft_type" in case.kwargs:
        pytest.skip("one adapter only")
    outputs = []
    for offloaded in (False, True):
        model = adapted(lib, case)
        if offloaded:
            away(model, case)
        for _ in range(2):  # the second time under a name that was there
            H.add(lib, model, case, "other")
            H.move(model, case.scale, only=lambda name, p: ".other" in name and p.is_floating_point())
            model.set_adapter("other")
            outputs.append(H.run(model, H.inputs(case)))
            model.set_adapter("default")
            model.delete_adapter("other")
    for got, want in zip(outputs[2:], outputs[:2]):
        H.close(got, want, 1e-6)


COMBINED = [("lora/linear/plain", {"combination_type": "cat"}), ("ia3/linear/plain", {})]


@pytest.mark.parametrize("case_id, options", COMBINED)
def test_offloaded_adapters_are_combined_and_converted(case_id, options, lib):
    models = []
    for offloaded in (False, True):
        case = next(c for c in CASES if c.id == case_id)
        model = adapted(lib, case)
        H.add(lib, model, case, "other")
        H.move(model, case.scale, only=lambda name, p: ".other" in name)
        models.append(away(model, case) if offloaded else model)
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "both", **options)
        model.set_adapter("both")
    plain, offloaded = models
    batch = H.inputs(case)
    want = H.run(plain, batch)
    H.close(H.run(offloaded, batch), want, 1e-6)
    if case_id.startswith("ia3"):  # it scales the bias too, which no LoRA can
        return
    (_, A), (_, B) = (lib.convert_to_lora(model, 2, adapter_name="default") for model in models)
    H.close(B, A, 1e-4)


def test_trained_biases_are_refused_where_the_model_is_offloaded(lib):
    case = next(c for c in CASES if c.id == "lora/linear/plain")
    base = away(case.base.build(), case)
    with pytest.raises(ValueError, match="offload"):
        lib.get_peft_model(base, H.config(lib, case, bias="all"))
    assert not any("lora" in n for n, _ in base.named_parameters())
    model = lib.get_peft_model(case.base.build(), H.config(lib, case, bias="all")).eval()
    want = H.run(away(H.move(model), case), H.inputs(case))
    with pytest.raises(ValueError, match="offload"), model.disable_adapter():
        pass
    H.close(H.run(model, H.inputs(case)), want, 1e-6)


@pytest.mark.parametrize("rank", [2, 4, 8], ids="r={}".format)
def test_hot_swapping_an_offloaded_adapter(rank, lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("a promise of the module under test alone")
    from minipeft.compat.hotswap import hotswap_adapter

    def model(seed, r=4):
        H.seed(0)
        base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        H.seed(seed)
        return lib.get_peft_model(base, lib.LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights=False)).eval()

    x, new, offloaded = torch.randn(3, 6), model(2, rank), model(1)
    new.save_pretrained(tmp_path)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    before = offloaded(x)
    hotswap_adapter(offloaded, str(tmp_path), "default", torch_device="cpu")
    torch.testing.assert_close(offloaded(x), new(x))
    assert not torch.allclose(offloaded(x), before, atol=1e-3)
