"""Bad input: one clear typed error, and the model is left as it was, bit for bit.

These are promises of the module under test alone; peft takes many of these inputs in silence.
"""

import errno
import json
import os
import pickle
import signal
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from . import bases
from . import harness as H
from .cases import CASES, each_case

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = next(c for c in CASES if c.id == "lora/linear/plain")
ONE_OF_EACH = [next(c for c in CASES if c.method == m) for m in dict.fromkeys(c.method for c in CASES)]
each_method = each_case(lambda c: c in ONE_OF_EACH)


@pytest.fixture(autouse=True)
def _not_for_peft(is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test alone")


def shape_of(model):
    """All that a failed call must leave alone: modules and their classes, tensors and their flags, configs, state."""
    return (
        {n: type(m) for n, m in model.named_modules()},
        {n: (p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()},
        {n: repr(c) for n, c in getattr(model, "peft_config", {}).items()},
        getattr(model, "active_adapters", None) if hasattr(model, "peft_config") else None,
        model.training,
    )


class unchanged:
    """A block that must raise `error` with a message and leave `model` as it was."""

    def __init__(self, model, error):
        self.model, self.error = model, error
        self.tensors, self.shape = H.snapshot(model), shape_of(model)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, _):
        assert kind is not None, "accepted without an error"
        if not issubclass(kind, self.error):
            return False
        assert len(str(value)) > 10, "the error says nothing"
        H.identical(H.snapshot(self.model), self.tensors)
        assert shape_of(self.model) == self.shape
        return True


# ------------------------------------------------------------------------------------------------ damaged checkpoints
def first_tensor(path):
    tensors = H.read(path / WEIGHTS)
    return tensors, sorted(tensors)[0]


def rewritten(change):
    def damage(path):
        tensors, name = first_tensor(path)
        change(tensors, name)
        save_file(tensors, path / WEIGHTS, {"format": "pt"})

    return damage


def _misshapen(tensors, name):
    tensors[name] = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)


def _transposed(tensors, name):
    tensors[name] = tensors[name].unsqueeze(0).transpose(0, -1).contiguous()


def _entry(value):
    def change(tensors, name):
        name = next(n for n in (name, *tensors) if tensors[n].is_floating_point())
        tensors[name].view(-1)[-1] = value

    return change


TENSOR_FAULTS = {
    "missing": lambda t, n: t.pop(n),
    "all missing": lambda t, n: t.clear(),
    "extra": lambda t, n: t.update({f"stranger.{n}x": torch.zeros(2)}),
    "misspelt": lambda t, n: t.update({n + "_": t.pop(n)}),
    "misshapen": _misshapen,
    "transposed": _transposed,
    "nan": _entry(float("nan")),
    "infinite": _entry(float("-inf")),
}


def truncated(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def header_cut(path):
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:20])


def renamed_pickle(path):
    torch.save(H.read(path / WEIGHTS), path / WEIGHTS)


def renamed_plain_pickle(path):
    (path / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))


def folder_in_place_of(name):
    def damage(path):
        (path / name).unlink()
        (path / name).mkdir()

    return damage


FILE_FAULTS = {
    "truncated": truncated,
    "header cut": header_cut,
    "empty": lambda p: (p / WEIGHTS).write_bytes(b""),
    "noise": lambda p: (p / WEIGHTS).write_bytes(bytes(range(256)) * 4),
    "pickle renamed": renamed_pickle,
    "plain pickle renamed": renamed_plain_pickle,
    "no weights": lambda p: (p / WEIGHTS).unlink(),
    "no config": lambda p: (p / CONFIG).unlink(),
    "weights are a folder": folder_in_place_of(WEIGHTS),
    "config is a folder": folder_in_place_of(CONFIG),
    "config is a list": lambda p: (p / CONFIG).write_text("[1, 2]"),
    "config is a string": lambda p: (p / CONFIG).write_text('"LORA"'),
    "config is null": lambda p: (p / CONFIG).write_text("null"),
    "config is empty": lambda p: (p / CONFIG).write_text(""),
    "config is cut": lambda p: (p / CONFIG).write_text((p / CONFIG).read_text()[:-40]),
    "config is not text": lambda p: (p / CONFIG).write_bytes(b"\xff\xfe\x00\x80"),
}

CONFIG_FAULTS = {
    "r is 0": {"r": 0},
    "r is -1": {"r": -1},
    "r is a string": {"r": "8"},
    "r is a float": {"r": 4.5},
    "r is null": {"r": None},
    "r is a list": {"r": [4]},
    "r does not fit": {"r": 5},
    "alpha is a string": {"lora_alpha": "6"},
    "dropout is a string": {"lora_dropout": "0.1"},
    "bias is unknown": {"bias": "some"},
    "bias is a number": {"bias": 3},
    "targets are a number": {"target_modules": 5},
    "targets are numbers": {"target_modules": [1, 2]},
    "targets match nothing": {"target_modules": ["nothing", "nowhere"]},
    "regex matches nothing": {"target_modules": "nothing.*"},
    "regex is broken": {"target_modules": "(wide"},
    "no targets": {"target_modules": []},
    "modules_to_save match nothing": {"modules_to_save": ["nowhere"]},
    "rank_pattern is a list": {"rank_pattern": [4]},
    "peft_type is unknown": {"peft_type": "LOOORA"},
    "peft_type is missing": {"peft_type": None},
    "peft_type is a number": {"peft_type": 7},
    "peft_type is another method's": {"peft_type": "IA3"},
    "task_type is unknown": {"task_type": "SINGING"},
    "init is unknown": {"init_lora_weights": "magic"},
    "inference_mode is a string": {"inference_mode": "yes"},
}


def changed_config(change):
    def damage(path):
        config = json.loads((path / CONFIG).read_text()) | change
        (path / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if (k, v) != ("peft_type", None)}))

    return damage


FAULTS = {
    **{f"tensor {n}": rewritten(f) for n, f in TENSOR_FAULTS.items()},
    **FILE_FAULTS,
    **{n: changed_config(c) for n, c in CONFIG_FAULTS.items()},
}


def good(lib, case, path):
    H.saved(H.move(H.adapt(lib, case), case.scale), path)
    return path


# a checkpoint of peft may name modules that its model did not have: its tensors say whether it fits
WHEN_LOADING = [fault for fault in FAULTS if fault != "modules_to_save match nothing"]


@pytest.mark.parametrize("fault", WHEN_LOADING)
def test_from_pretrained(fault, lib, tmp_path):
    path = good(lib, LORA, tmp_path)
    FAULTS[fault](path)
    base = LORA.base.build()
    with unchanged(base, lib.PeftError):
        lib.PeftModel.from_pretrained(base, str(path))


@pytest.mark.parametrize("fault", WHEN_LOADING)
def test_load_adapter(fault, lib, tmp_path):
    path = good(lib, LORA, tmp_path)
    FAULTS[fault](path)
    model = H.adapt(lib, LORA)
    with unchanged(model, lib.PeftError):
        model.load_adapter(str(path), "other")


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
@each_method
def test_tensors_of_each_method(case, fault, lib, tmp_path):
    path = good(lib, case, tmp_path)
    rewritten(TENSOR_FAULTS[fault])(path)
    base = case.base.build()
    with unchanged(base, lib.PeftError):
        lib.PeftModel.from_pretrained(base, str(path))
    state = H.read(path / WEIGHTS)
    model = H.adapt(lib, case)
    with unchanged(model, lib.PeftError):
        lib.set_peft_model_state_dict(model, state)


def test_the_undamaged_checkpoint_loads(lib, tmp_path):
    path = good(lib, LORA, tmp_path)
    lib.PeftModel.from_pretrained(LORA.base.build(), str(path))
    H.adapt(lib, LORA).load_adapter(str(path), "other")


def test_a_pickle_never_runs(lib, tmp_path):
    """Neither under the name of a safetensors file, nor under its own when nobody asked for it."""
    path, marker = good(lib, LORA, tmp_path / "a"), tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (path / WEIGHTS).write_bytes(pickle.dumps(Evil()))
    for name in (WEIGHTS, "adapter_model.bin"):
        if name != WEIGHTS:
            (path / WEIGHTS).rename(path / name)
        base = LORA.base.build()
        with unchanged(base, lib.PeftError):
            lib.PeftModel.from_pretrained(base, str(path))
        assert not marker.exists()


def test_no_such_folder(lib, tmp_path):
    base = LORA.base.build()
    with unchanged(base, lib.PeftError):
        lib.PeftModel.from_pretrained(base, str(tmp_path / "nowhere"))
    file = tmp_path / "file"
    file.write_text("x")
    with unchanged(base, (lib.PeftError, OSError)):
        lib.PeftModel.from_pretrained(base, str(file))


# --------------------------------------------------------------------------------------------------- configs and names
@pytest.mark.parametrize("fault", [n for n in CONFIG_FAULTS if "peft_type" not in n and n != "r does not fit"])
def test_config_in_code(fault, lib):
    base, model = LORA.base.build(), H.adapt(lib, LORA)
    uses = (base, lambda c: lib.get_peft_model(base, c)), (model, lambda c: model.add_adapter("other", c))
    for target, use in uses:
        with unchanged(target, lib.PeftError):
            use(H.config(lib, LORA, **CONFIG_FAULTS[fault]))


@pytest.mark.parametrize("config", [{"peft_type": "LOOORA"}, {"r": 4}, {"peft_type": None}, [], None, "LORA"], ids=str)
def test_get_peft_config(config, lib):
    with pytest.raises(lib.PeftError):
        lib.get_peft_config(config)


BAD_NAMES = ["a.b", ".", "..", "", "a/b", "../up", "\0", 3, None]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_adapter_name(name, lib, tmp_path):
    base = LORA.base.build()
    with unchanged(base, lib.PeftError):
        lib.get_peft_model(base, H.config(lib, LORA), adapter_name=name)
    model = H.adapt(lib, LORA)
    with unchanged(model, lib.PeftError):
        model.add_adapter(name, H.config(lib, LORA))
    path = good(lib, LORA, tmp_path)
    with unchanged(model, lib.PeftError):
        model.load_adapter(str(path), name)


MODULE_NAMES = ["wide", "head", "base_layer", "lora_A", "weight", "model", "base_model", "keys", "pop"]


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_adapter_named_like_a_module(name, lib, tmp_path):
    """Refused, or it loses nothing: all tensors are saved and come back."""
    base = LORA.base.build()
    before = H.snapshot(base)
    try:
        model = lib.get_peft_model(base, H.config(lib, LORA), adapter_name=name).eval()
    except lib.PeftError as error:
        assert name in str(error)
        H.identical(H.snapshot(base), before)
        return
    H.move(model, LORA.scale)
    model.save_pretrained(str(tmp_path))
    tensors, _ = H.stored(tmp_path / name)
    want, _ = H.saved(H.adapt(lib, LORA), tmp_path / "plain")
    H.same_names(tensors, want)
    loaded = lib.PeftModel.from_pretrained(LORA.base.build(), str(tmp_path / name), adapter_name=name).eval()
    H.close(H.run(loaded, H.inputs(LORA)), H.run(model, H.inputs(LORA)), 1e-6)


def test_names_in_use(lib):
    model = H.adapt(lib, LORA)
    for action in (lambda: model.add_adapter("default", H.config(lib, LORA, r=2)),
                   lambda: model.set_adapter("nobody"), lambda: model.delete_adapter("nobody")):
        with unchanged(model, lib.PeftError):
            action()


def test_config_of_another_method(lib):
    model = H.adapt(lib, LORA)
    with unchanged(model, lib.PeftError):
        model.add_adapter("other", lib.IA3Config(target_modules=["wide"], feedforward_modules=[]))


def test_half_way_failure(lib):
    """The second target is of a kind that cannot be adapted: the first must not stay adapted."""
    base = bases.STACK.build()
    with unchanged(base, lib.PeftError):
        lib.get_peft_model(base, lib.LoraConfig(r=2, target_modules=["q", "norm"]))


# -------------------------------------------------------------------------------------------- a save that is broken off
class Steps:
    """Calls `stop` at the k-th step that reaches the disk: before it, in the middle of a write, and after it."""

    NEED_SPACE = ("replace", "rename", "fsync", "link")
    ALL = (*NEED_SPACE, "chmod", "unlink", "remove")

    def __init__(self, at, stop, calls=ALL):
        self.at, self.stop, self.calls, self.count = at, stop, calls, 0

    def step(self):
        self.count += 1
        if self.count == self.at:
            self.stop()

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.step()
            result = function(*args, **kwargs)
            self.step()
            return result

        return wrapped

    def opener(self, function):
        def wrapped(file, mode="r", *args, **kwargs):
            opened = function(file, mode, *args, **kwargs)
            return HalfWriter(opened, self) if set(mode) & set("wax+") else opened

        return wrapped

    def patch(self, patcher):
        for name in self.calls:
            patcher.setattr(os, name, self.wrap(getattr(os, name)))
        patcher.setattr(tempfile, "mkstemp", self.wrap(tempfile.mkstemp))
        patcher.setattr(os, "fdopen", self.opener(os.fdopen))
        patcher.setattr("builtins.open", self.opener(open))


class HalfWriter:
    """A file whose writes reach the disk in two halves, with a step before, between and after them."""

    def __init__(self, file, steps):
        self._file, self._steps = file, steps

    def write(self, data):
        self._steps.step()
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._file.write(half)
            self._file.flush()
            self._steps.step()
        return len(data)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._file, name)


def old_and_new(lib):
    """Two states of one adapter that differ in tensors and config, so that a mixture shows."""
    old = H.move(H.adapt(lib, LORA), 0.1)
    new = H.move(lib.get_peft_model(LORA.base.build(), H.config(lib, LORA, lora_alpha=24)).eval(), 0.3)
    return old, new


def found(lib, path):
    """Which state loads from `path`: its alpha and its output. A pickle is taken where there is nothing else."""
    try:
        model = lib.PeftModel.from_pretrained(LORA.base.build(), str(path)).eval()
    except lib.PeftError as error:
        if "pickle" not in str(error):
            raise
        model = lib.PeftModel.from_pretrained(LORA.base.build(), str(path), use_safetensors=False).eval()
    return model.peft_config["default"].lora_alpha, H.run(model, H.inputs(LORA))


def old_or_new(lib, path, old, new):
    alpha, output = found(lib, path)
    model = {LORA.kwargs["lora_alpha"]: old, 24: new}[alpha]
    H.close(output, H.run(model, H.inputs(LORA)), 1e-6)
    return "old" if model is old else "new"


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork: a killed save cannot be tried")
@pytest.mark.parametrize("before", ["over an old one", "over an old pickle", "into an empty folder"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_killed_while_saving(before, safe, lib, tmp_path):
    old, new = old_and_new(lib)
    H.run(old, H.inputs(LORA))
    seen, at = set(), 0
    while True:
        at += 1
        assert at < 400, "the save never ended"
        path = tmp_path / str(at)
        if before != "into an empty folder":
            old.save_pretrained(str(path), safe_serialization=before == "over an old one")
        child = os.fork()
        if child == 0:
            patcher = pytest.MonkeyPatch()
            try:
                Steps(at, kill).patch(patcher)
                new.save_pretrained(str(path), safe_serialization=safe)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        if before != "into an empty folder":
            seen.add(old_or_new(lib, path, old, new))
        else:
            try:
                seen.add(old_or_new(lib, path, old, new))
            except lib.PeftError:
                seen.add("none")
        new.save_pretrained(str(path), safe_serialization=safe)  # what a killed save left does not hinder the next
        assert old_or_new(lib, path, old, new) == "new"
        if not os.WIFSIGNALED(status):
            break
    assert at > 8, f"only {at - 1} steps were seen: the patches do not reach the writer"
    assert seen == ({"none", "new"} if before == "into an empty folder" else {"old", "new"})


def test_disk_full_while_saving(lib, tmp_path):
    old, new = old_and_new(lib)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    seen, at, failed = set(), 0, True
    while failed:
        at += 1
        assert at < 400, "the save never ended"
        path = tmp_path / str(at)
        old.save_pretrained(str(path))
        names = sorted(p.name for p in path.iterdir())
        steps, before = Steps(at, full, Steps.NEED_SPACE), H.snapshot(new)
        with pytest.MonkeyPatch.context() as patcher:
            steps.patch(patcher)
            try:
                new.save_pretrained(str(path))
            except OSError as error:
                assert error.errno == errno.ENOSPC
        failed = steps.count >= at
        H.identical(H.snapshot(new), before)
        seen.add(old_or_new(lib, path, old, new))
        new.save_pretrained(str(path))
        assert old_or_new(lib, path, old, new) == "new"
        assert sorted(p.name for p in path.iterdir()) == names, "files of the failed save are left"
    assert at > 8, f"only {at - 1} steps were seen: the patches do not reach the writer"
    assert seen == {"old", "new"}


def test_saving_onto_a_file(lib, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises((lib.PeftError, OSError)):
        H.adapt(lib, LORA).save_pretrained(str(file))
    assert file.read_text() == "precious"
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises((lib.PeftError, OSError)):
        H.adapt(lib, LORA).save_pretrained(str(tmp_path))
    assert not (tmp_path / CONFIG).exists()
