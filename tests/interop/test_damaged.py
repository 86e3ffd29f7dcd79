"""Damaged and hostile files: whatever is changed in a saved adapter, loading it works or is one typed error.

A short and repeatable fuzzer over all methods. `test_bad_input.py` has the faults that were thought of one by one.
"""

import copy
import json
import os
import random
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from . import bases
from . import harness as H
from .cases import CASES, each_case
from .cases.case import Case
from .test_bad_input import CONFIG, ONE_OF_EACH, WEIGHTS, unchanged

each_method = each_case(lambda c: c in ONE_OF_EACH)
LORA = next(c for c in CASES if c.id == "lora/linear/plain")
LONGEST = 1100  # characters of a message
SAVED: dict = {}  # by method: (configuration, tensors, output)


@pytest.fixture(autouse=True)
def _not_for_peft(is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test alone")


def saved(lib, case, tmp_path):
    """A valid adapter: its configuration and its tensors."""
    if case.id not in SAVED:
        model = H.move(H.adapt(lib, case)).eval()
        tensors, _ = H.saved(model, tmp_path)
        SAVED[case.id] = (json.loads((tmp_path / CONFIG).read_text()), tensors)
    return copy.deepcopy(SAVED[case.id])


def write(tmp_path, config, tensors):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / CONFIG).write_text(text)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})


def load(lib, case, tmp_path, error=None):
    """Load what is there. With `error` it must be refused; otherwise it may be, but only in this way."""
    base, start = case.base.build(), time.perf_counter()
    model = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with unchanged(base, error or lib.PeftError):
                model = lib.PeftModel.from_pretrained(base, tmp_path)
                if error is None:
                    raise Loaded
        except Loaded:
            pass
        if model is not None:
            H.run(model, H.inputs(case))
    assert time.perf_counter() - start < 10
    return model


class Loaded(Exception):
    pass


# ------------------------------------------------------------------------------------------------------ configurations
def deep(levels):
    return [deep(levels - 1)] if levels else []


VALUES = [
    None, True, False, 0, 1, -1, 3, 1.5, -0.5, 1e308, float("nan"), float("inf"), 10**15, 10**18, -(10**18), 10**30, "",
    "16", "None", ".*", "(", "*", "[", "\u0000", "x" * 100_000, [], [[]], [None], [1, "a"], [0.5], {}, {"": 1},
    {"a": [1]}, {"(": 1}, {".*": None}, {".*": 10**18}, {"peft_type": "LORA"}, deep(400), ["x" * 100_000], "gaussian",
    "eva", "pissa",
]  # fmt: skip
MORE = ["cls", "self", "__class__", "_method", "rank_pattern", "alpha_pattern", "layers_pattern", "loftq_config",
        "velora_config", "use_bdlora", "runtime_config", "layers_to_transform", "trainable_token_indices"]  # fmt: skip


@each_method
def test_any_value_of_any_field(lib, case: Case, tmp_path):
    config, tensors = saved(lib, case, tmp_path)
    rng = random.Random(case.id)
    for _ in range(14):
        changed = dict(config)
        for _ in range(rng.choice([1, 1, 2])):
            changed[rng.choice([*config, *config, rng.choice(MORE)])] = rng.choice(VALUES)
        write(tmp_path, changed, tensors)
        load(lib, case, tmp_path)


@each_method
def test_numbers_that_are_none(lib, case: Case, tmp_path):
    """NaN and the infinities are no value of any field."""
    config, tensors = saved(lib, case, tmp_path)
    numbers = [k for k, v in config.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    for field in numbers:
        for value in (float("nan"), float("-inf"), 10**30):
            write(tmp_path, {**config, field: value}, tensors)
            with pytest.raises(lib.PeftError, match=field):
                lib.PeftConfig.from_pretrained(tmp_path)


HUGE = {  # a size that the file cannot have, for methods that make tensors before they see its own
    "vera": "r", "pvera": "r", "randlora": "r", "vblora": "num_vectors", "unilora": "theta_d_length", "lora": "r",
    "prompt_tuning": "num_virtual_tokens", "prefix_tuning": "num_virtual_tokens", "p_tuning": "num_virtual_tokens",
    "cartridge": "num_virtual_tokens", "multitask_prompt_tuning": "num_ranks", "adaption_prompt": "adapter_len",
    "poly": "n_tasks", "peanut": "r", "hira": "r", "ia3": None,
}  # fmt: skip


@each_case(lambda c: c in ONE_OF_EACH and HUGE.get(c.method))
def test_sizes_are_compared_with_the_file_before_memory_is_taken(lib, case: Case, tmp_path):
    config, tensors = saved(lib, case, tmp_path)
    for value in (10**9, 10**12):
        write(tmp_path, {**config, HUGE[case.method]: value}, tensors)
        start = time.perf_counter()
        load(lib, case, tmp_path, lib.PeftError)
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize("fields", [{"r": 10**15}, {"r": 10**18}, {"r": 4, "rank_pattern": {".*": 10**17}}])
def test_sizes_that_nothing_can_have(lib, fields):
    base = LORA.base.build()
    with unchanged(base, lib.PeftError):
        lib.get_peft_model(base, H.config(lib, LORA, **fields))


TEXTS = {
    "deep": lambda text: text.rstrip()[:-1] + ',"z":' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": lambda text: text.rstrip()[:-1] + ',"z":' + "9" * 5000 + "}",
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "list": lambda text: "[]",
    "not a number": lambda text: "NaN",
    "a pointer": lambda text: "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("text", TEXTS)
def test_configurations_that_are_no_json(lib, text, tmp_path):
    config, tensors = saved(lib, LORA, tmp_path)
    write(tmp_path, TEXTS[text](json.dumps(config)), tensors)
    load(lib, LORA, tmp_path, None if text == "digits" else lib.PeftError)


# -------------------------------------------------------------------------------------------------------------- tensors
def cast(dtype):
    return lambda t: t.to(dtype)


TENSORS = {
    "complex": (cast(torch.complex64), "refused"),
    "int64": (cast(torch.int64), None),
    "uint8": (lambda t: t.abs().to(torch.uint8), None),
    "bool": (lambda t: t > 0, None),
    "float8": (cast(torch.float8_e4m3fn), None),
    "float64": (cast(torch.float64), None),
    "too large for float32": (lambda t: t.double() + 1e300, "refused"),
    "NaN": (lambda t: t.float() * float("nan"), "refused"),
    "one dimension more": (lambda t: t[None], "refused"),
}


@each_method
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_other_kinds(lib, case: Case, kind, tmp_path):
    config, tensors = saved(lib, case, tmp_path)
    change, refused = TENSORS[kind]
    key = next(k for k in sorted(tensors) if tensors[k].is_floating_point())
    write(tmp_path, config, {**tensors, key: change(tensors[key]).contiguous()})
    model = load(lib, case, tmp_path, lib.PeftError if refused else None)
    if not refused and model is not None:  # cast to what it is for, as by peft
        got = lib.get_peft_model_state_dict(model)[key]
        assert got.is_floating_point()
        torch.testing.assert_close(got.float(), change(tensors[key]).float())


POSITIONS = ("shira", "unilora", "supertuning", "frod")


@each_case(lambda c: c.method in POSITIONS and c.base is bases.MLP)
def test_positions_that_do_not_exist(lib, case: Case, tmp_path):
    model = H.move(H.adapt(lib, case)).eval()
    tensors, config = H.saved(model, tmp_path)
    numbers = [k for k in tensors if not tensors[k].is_floating_point() and "size" not in k and tensors[k].numel()]
    for key in numbers:
        for value in (-1, 10**6, 2**31 - 1):
            for place in (0, -1):
                changed = tensors[key].clone()
                changed.view(-1)[place] = value
                write(tmp_path, config, {**tensors, key: changed})
                load(lib, case, tmp_path, lib.PeftError)
        write(tmp_path, config, {**tensors, key: tensors[key] + 0.5})
        load(lib, case, tmp_path, lib.PeftError)
        live = H.adapt(lib, case)
        with unchanged(live, lib.PeftError):
            lib.set_peft_model_state_dict(live, {**tensors, key: changed})


@each_method
def test_tensors_under_other_names(lib, case: Case, tmp_path):
    config, tensors = saved(lib, case, tmp_path)
    rng = random.Random(case.id)
    for _ in range(4):
        key = rng.choice(sorted(tensors))
        others = ["", "x" * 10_000, "base_model.model.", "base_model.model.head.weight", key.replace(".", "_")]
        name = rng.choice([*others, key.upper(), key + " ", key[:-1], key + "\u0000", "é" + key, key + ".weight"])
        changed = dict(tensors)
        changed[name] = changed[key] if rng.random() < 0.5 else changed.pop(key)
        if rng.random() < 0.3:
            changed |= {f"{'y' * 3000}{i}": torch.zeros(1) for i in range(50)}
        write(tmp_path, config, {k: t.clone() for k, t in changed.items()})
        load(lib, case, tmp_path)


# --------------------------------------------------------------------------------------------------------------- hints
HINTS = {
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs pointer"),
    "html": (b"<!doctype html><html><body>Not found</body></html>", "HTML"),
    "zip": (b"PK\x03\x04" + b"\x00" * 100, "zip"),
    "pickle": (b"\x80\x04N.", "pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + b"\x00" * 100, "gguf"),
    "json": (b'{"a": 1}' * 10, "JSON"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
@pytest.mark.parametrize("kind", HINTS)
def test_files_of_another_kind_are_called_by_their_name(lib, kind, name, tmp_path):
    config, tensors = saved(lib, LORA, tmp_path)
    write(tmp_path, config, tensors)
    (tmp_path / WEIGHTS).unlink()
    content, hint = HINTS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(lib.PeftError, match=hint):
        lib.PeftModel.from_pretrained(LORA.base.build(), tmp_path)


KOHYA = {
    "kohya": ["lora_unet_up_blocks_0_to_q.lora_down.weight", "lora_unet_up_blocks_0_to_q.lora_up.weight"],
    "text encoder": ["lora_te1_text_model_q_proj.alpha"],
    "lycoris": ["lycoris_blocks_0.hada_w1_a"],
    "old diffusers": ["unet.mid_block.processor.to_q_lora.down.weight"],
}


@pytest.mark.parametrize("kind", KOHYA)
def test_keys_of_other_software_are_called_by_their_name(lib, kind, tmp_path):
    config, _ = saved(lib, LORA, tmp_path)
    write(tmp_path, config, {key: torch.zeros(2, 2) for key in KOHYA[kind]})
    with pytest.raises(lib.PeftError, match="load_lora_weights"):
        lib.PeftModel.from_pretrained(LORA.base.build(), tmp_path)


def test_messages_are_short(lib):
    names = {f"{'layer' * 100}_{i}": nn.Linear(2, 2) for i in range(50)}
    net = nn.ModuleDict(names)
    with pytest.raises(lib.PeftError) as error:
        lib.get_peft_model(net, lib.LoraConfig(target_modules=[f"{'later' * 1000}_{i}" for i in range(50)]))
    assert len(str(error.value)) < LONGEST
    with pytest.raises(lib.PeftError, match="target_modules") as error:
        lib.LoraConfig(target_modules=["x" * 10**6, 1])
    assert len(str(error.value)) < LONGEST


@each_case(lambda c: c.id in ("shira/linear/plain", "unilora/linear/save_indices", "supertuning/linear/plain",
                              "frod/linear/plain"))
def test_positions_may_be_whole_numbers_in_floats(case, lib, is_ref):
    """As a program without integers in its files writes them; a fraction is no position."""
    if is_ref:
        pytest.skip("a promise of the module under test alone")
    model = H.adapt(lib, case)
    held = {k: t.clone() for k, t in lib.get_peft_model_state_dict(model).items()}
    whole = [k for k, t in held.items() if not t.is_floating_point()]
    assert whole
    lib.set_peft_model_state_dict(model, {k: t.float() for k, t in held.items()})
    H.identical(lib.get_peft_model_state_dict(model), held)
    with pytest.raises(lib.PeftError, match="positions"):
        lib.set_peft_model_state_dict(model, {**held, whole[0]: held[whole[0]] + 0.5})


def loading(lib, path, config):
    model = lib.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
    model.save_pretrained(path)
    return lambda: lib.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(6, 5)), path)


def test_weights_that_are_no_file(lib, tmp_path):
    """Opening a pipe that nobody writes to would wait for ever."""
    load = loading(lib, tmp_path, lib.LoraConfig(target_modules=["0"]))
    (tmp_path / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    with pytest.raises(lib.CheckpointError, match="not a file"):
        load()


@pytest.mark.parametrize("proj_seed, r", [(-5, 4), (42, 10**18)])
def test_uni_loras_indices_cannot_be_drawn(proj_seed, r, lib, tmp_path):
    load = loading(lib, tmp_path, lib.UniLoraConfig(target_modules=["0"], theta_d_length=9))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "proj_seed": proj_seed, "r": r}))
    with pytest.raises(lib.PeftError):
        load()


def test_more_subspaces_than_rows_are_as_many_as_rows(lib):
    config = lib.AdamssConfig(target_modules=["0"], num_subspaces=3 * 10**9)
    model = lib.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
    assert model.base_model.model[0].num_subspaces["default"] <= 5
