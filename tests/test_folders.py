"""The folder of a checkpoint: writers, readers, hands and copies beside each other. See also interop/test_bad_input.py.

Each version of the adapter here has one number in its configuration and in all of its tensors, so that a mixture shows.
"""

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

import minipeft
from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.core import files
from minipeft.core.config import PeftConfig

CONFIG, WEIGHTS, PICKLE = files.CONFIG_NAME, files.SAFETENSORS_WEIGHTS_NAME, files.WEIGHTS_NAME
posix = pytest.mark.skipif(os.name != "posix", reason="permissions, links and locks as POSIX has them")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork: a killed save cannot be tried")


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def version(number):
    model = get_peft_model(network(), LoraConfig(r=2, lora_alpha=number, target_modules=["0", "1"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(number)
    return model


def number_of(model, adapter="default"):
    """Which version an adapter is. Its tensors and its configuration must agree."""
    tensors = minipeft.get_peft_model_state_dict(model, adapter_name=adapter).values()
    numbers = {float(value) for tensor in tensors for value in tensor.flatten()}
    assert numbers == {model.peft_config[adapter].lora_alpha}, "a mixture of two versions"
    return int(numbers.pop())


def found(folder, **options):
    return number_of(PeftModel.from_pretrained(network(), folder, **options))


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def pickled(folder):
    return {} if (Path(folder) / WEIGHTS).exists() else {"use_safetensors": False}


def killed_between_renames(folder, number, safe=True):
    """Save that version in a process that dies when the configuration is the new one and the weights are not."""
    child = os.fork()
    if child == 0:
        rename = os.replace

        def replace(source, target):
            rename(source, target)
            if Path(target).name == CONFIG:
                os._exit(9)

        os.replace = replace
        version(number).save_pretrained(folder, safe_serialization=safe)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(name.startswith(".") for name in names(folder))


# --------------------------------------------------------------------------------------------- what is visible counts
def test_hidden_files_mean_nothing(tmp_path):
    version(1).save_pretrained(tmp_path)
    tensors = minipeft.load_peft_weights(tmp_path, "cpu")
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt", "adapter_config_sha256": "not-even-a-hash"})
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    version(2).save_pretrained(tmp_path / "two")
    for name in (CONFIG, WEIGHTS):
        for ending in ("", ".tmp", ".next", "." + "0" * 64, ".not-even-a-hash"):
            shutil.copy(tmp_path / "two" / name, tmp_path / f".{name}{ending}")
    shutil.copy(tmp_path / "two" / WEIGHTS, tmp_path / ".adapter_model.000000000000_111111111111.safetensors")
    assert found(tmp_path) == 1
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole, "a reader writes nothing"


@forks
def test_a_hand_after_a_killed_save(tmp_path):
    """Whoever edits or replaces a file gets what he sees, though weights for what stood there are still hidden."""
    for case in ("config edited", "weights replaced", "weights written to"):
        folder = tmp_path / case
        version(1).save_pretrained(folder)
        killed_between_renames(folder, 2)
        assert found(folder) == 2
        version(3).save_pretrained(tmp_path / "three")
        if case == "config edited":
            text = (folder / CONFIG).read_text()
            (folder / CONFIG).write_text(text.replace('"lora_alpha": 2', '"lora_alpha": 1'))
            assert found(folder) == 1
        else:
            by_hand = shutil.move if case == "weights replaced" else shutil.copyfile
            by_hand(tmp_path / "three" / WEIGHTS, folder / WEIGHTS)
            weights = minipeft.load_peft_weights(folder, "cpu")
            assert {float(t.flatten()[0]) for t in weights.values()} == {3.0}
        version(4).save_pretrained(folder)
        assert found(folder) == 4
        assert names(folder) == ["README.md", CONFIG, WEIGHTS]


@forks
@pytest.mark.parametrize("before", [True, False, None])
@pytest.mark.parametrize("safe", [True, False])
def test_the_next_writer_finishes_a_killed_save(before, safe, tmp_path):
    if before is not None:
        version(1).save_pretrained(tmp_path, safe_serialization=before)
    killed_between_renames(tmp_path, 2, safe)
    assert found(tmp_path, **({} if safe else {"use_safetensors": False})) == 2
    version(2).peft_config["default"].save_pretrained(tmp_path)  # the configuration alone
    name = WEIGHTS if safe else PICKLE
    assert [x for x in names(tmp_path) if x != "README.md"] == [CONFIG, name]
    assert found(tmp_path, **pickled(tmp_path)) == 2


def test_one_format_at_a_time(tmp_path):
    """Weights in the other format would belong to another configuration."""
    for number, safe in enumerate([True, False, True, True, False, False], 1):
        version(number).save_pretrained(tmp_path, safe_serialization=safe)
        assert names(tmp_path) == sorted(["README.md", CONFIG, WEIGHTS if safe else PICKLE])
        assert found(tmp_path, **pickled(tmp_path)) == number


# ----------------------------------------------------------------------------------------- readers and writers at once
def by_from_pretrained(folder):
    return number_of(PeftModel.from_pretrained(network(), folder))


def by_load_adapter(folder):
    model = version(99)
    model.load_adapter(folder, "other")
    return number_of(model, "other")


def by_mixed_model(folder):
    return number_of(minipeft.PeftMixedModel.from_pretrained(network(), folder))


def by_subfolder(folder):
    return found(folder.parent, subfolder=folder.name)


def by_hotswap(folder):
    model = version(99)
    from minipeft.compat.hotswap import hotswap_adapter

    hotswap_adapter(model, folder, "default", torch_device="cpu")
    number = model.base_model.model[0].scaling["default"] * 2
    assert {float(t.flatten()[0]) for t in minipeft.get_peft_model_state_dict(model).values()} == {number}
    return int(number)


WAYS = [by_from_pretrained, by_load_adapter, by_mixed_model, by_subfolder, by_hotswap]


@pytest.mark.parametrize("read", WAYS)
def test_a_save_between_the_reading_of_two_files(read, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    version(1).save_pretrained(folder)
    real, saves = PeftConfig.from_json_file.__func__, iter([2, 3])

    def read_then_saved(cls, path, **kwargs):
        fields = real(cls, path, **kwargs)
        for number in saves:
            version(number).save_pretrained(folder)
            break
        return fields

    monkeypatch.setattr(PeftConfig, "from_json_file", classmethod(read_then_saved))
    assert read(folder) == 3


def test_weights_renamed_under_a_reader(tmp_path, monkeypatch):
    """A path that a reader was given may be gone when it opens it."""
    version(1).save_pretrained(tmp_path)
    real, gone = files.find_weights, [tmp_path / "gone"]

    def find(*args, **kwargs):
        if gone:
            version(2).save_pretrained(tmp_path)
            return gone.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(minipeft.core.state, "find_weights", find)
    assert found(tmp_path) == 2


def test_a_folder_that_never_stands_still(tmp_path, monkeypatch):
    version(1).save_pretrained(tmp_path)
    model = version(2)
    real = PeftConfig.from_json_file.__func__

    def read_then_saved(cls, path, **kwargs):
        fields = real(cls, path, **kwargs)
        model.save_pretrained(tmp_path)
        return fields

    monkeypatch.setattr(PeftConfig, "from_json_file", classmethod(read_then_saved))
    monkeypatch.setattr(files, "TRIES", 3)
    with pytest.raises(minipeft.CheckpointError, match="faster than they can be read"):
        found(tmp_path)


@posix
def test_two_writers(tmp_path, monkeypatch):
    """The second begins while the first is in the midst of it: it waits, and both finish."""
    real, errors, others = os.fsync, [], []

    def save(number):
        try:
            version(number).save_pretrained(tmp_path)
        except BaseException as error:
            errors.append(error)

    def fsync(handle):
        if not others:
            others.append(threading.Thread(target=save, args=(2,)))
            others[0].start()
            others[0].join(0.3)
            assert others[0].is_alive(), "it did not wait"
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(1)
    others[0].join()
    assert not errors
    assert found(tmp_path) == 2
    assert names(tmp_path) == ["README.md", CONFIG, WEIGHTS]


@posix
def test_many_writers_and_readers(tmp_path):
    models = [version(number) for number in range(1, 4)]
    models[0].save_pretrained(tmp_path)
    errors, seen = [], set()

    def attempt(action):
        try:
            for _ in range(8):
                action()
        except BaseException as error:
            errors.append(error)

    actions = [lambda model=model: model.save_pretrained(tmp_path) for model in models]
    actions += [lambda: seen.add(found(tmp_path))] * 2
    threads = [threading.Thread(target=attempt, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert seen <= {1, 2, 3}
    assert found(tmp_path) in {1, 2, 3}
    assert names(tmp_path) == ["README.md", CONFIG, WEIGHTS]


@posix
def test_where_a_folder_cannot_be_locked(tmp_path, monkeypatch):
    """It is saved all the same, and what may be another writer's is left alone."""
    import fcntl

    def refuse(*args):
        raise OSError("Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    other = tmp_path / f".{WEIGHTS}.0123456789abcdef.tmp"
    other.write_text("being written")
    for number in (1, 2):
        version(number).save_pretrained(tmp_path)
        assert found(tmp_path) == number
    assert names(tmp_path) == [other.name, "README.md", CONFIG, WEIGHTS]


# ----------------------------------------------------------------------------------------------- all sorts of folders
def test_other_files_in_the_folder(tmp_path):
    """What killed saves left goes; what is not ours stays, though it looks similar."""
    left = [f".{WEIGHTS}.0123456789abcdef.tmp", f".{CONFIG}.0123456789abcdef.tmp", ".README.md.0123456789abcdef.tmp",
            ".adapter_model.000000000000_111111111111.safetensors", ".adapter_model.000000000000.bin"]
    others = [f".{CONFIG}.swp", f"{CONFIG}~", "model.safetensors", ".adapter_model.safetensors.icloud", ".hidden",
              "adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json", "other"]
    for name in left + others:
        (tmp_path / name).write_text(name)
    version(1).save_pretrained(tmp_path)
    assert names(tmp_path) == sorted([*others, "README.md", CONFIG, WEIGHTS])
    assert all((tmp_path / name).read_text() == name for name in others)
    assert found(tmp_path) == 1


@posix
def test_permissions(tmp_path):
    """New files get what the umask leaves; a file in the place of another gets that one's."""
    before = os.umask(0o027)
    try:
        version(1).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    mode = lambda name: stat.S_IMODE((tmp_path / name).stat().st_mode)
    assert [mode(name) for name in names(tmp_path)] == [0o640] * 3
    (tmp_path / WEIGHTS).chmod(0o600)
    version(2).save_pretrained(tmp_path)
    assert [mode(name) for name in names(tmp_path)] == [0o640, 0o640, 0o600]
    assert found(tmp_path) == 2


@posix
def test_links(tmp_path):
    """A link to a folder is followed; a link to a file is replaced, and what it pointed to stays."""
    real = tmp_path / "real"
    version(1).save_pretrained(real)
    (tmp_path / "link").symlink_to(real)
    version(2).save_pretrained(tmp_path / "link")
    assert found(real) == 2
    cached = tmp_path / "cached"
    cached.mkdir()
    for name in (CONFIG, WEIGHTS):
        (cached / name).symlink_to(real / name)
    assert found(cached) == 2
    version(3).save_pretrained(cached)
    assert (found(cached), found(real)) == (3, 2)


def test_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    version(1).save_pretrained(".")
    assert found(".") == found(tmp_path) == 1
    version(2).save_pretrained("a/b")
    assert found(Path("a", "b")) == 2


def test_several_adapters(tmp_path):
    model = version(1)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=5, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if ".other" in name:
            parameter.data.fill_(5)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert (found(tmp_path), found(tmp_path / "other")) == (1, 5)
        assert names(tmp_path) == ["README.md", CONFIG, WEIGHTS, "other"]
        assert names(tmp_path / "other") == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("where", ["a file", "in a file", "a broken link"])
def test_no_folder(where, tmp_path):
    (tmp_path / "file").write_text("precious")
    if where == "a broken link":
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    folder = {"a file": "file", "in a file": "file/folder", "a broken link": "link"}[where]
    with pytest.raises(minipeft.CheckpointError, match="should be a directory"):
        version(1).save_pretrained(tmp_path / folder)
    assert (tmp_path / "file").read_text() == "precious"


@posix
def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    version(1).save_pretrained(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != WEIGHTS)  # root may write anywhere
    with pytest.raises(PermissionError, match="read-only"):
        version(2).save_pretrained(tmp_path)
    assert found(tmp_path) == 1


@pytest.mark.parametrize("safe", [True, False])
def test_two_saves_are_the_same_bytes(safe, tmp_path):
    model = version(1)
    for name in "ab":
        model.save_pretrained(tmp_path / name, safe_serialization=safe)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("text", ["[1]", "{", "null", "\ud800"])
def test_a_damaged_config_of_the_base_model_does_not_stop_saving(text, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    network = nn.Sequential(nn.Linear(3, 4))
    network.name_or_path = str(tmp_path / "base")
    network.config = type("Config", (), {"vocab_size": 3})()
    model = minipeft.get_peft_model(network, minipeft.LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
