"""The files of a checkpoint: where they are, and how they are written so that a crash never leaves half of one.

An adapter is two files, `adapter_config.json` and `adapter_model.safetensors`. Renaming the weights is the one moment
at which the new checkpoint takes the old one's place. When the configuration changes too, the new one waits in a
pending file whose hash the weights carry, and a reader that comes between the two renames takes it from there.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from .errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
CONFIG_HASH = "adapter_config_sha256"  # the key in the weights' metadata
PICKLE = b"\x80"  # what a pickle begins with
LOOKS = {  # what a file begins with, and what to say of it
    b"version https://git-lfs": "It is a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned.",
    b"<": "It looks like an HTML page: what was downloaded is an error or a login page, not the file.",
    PICKLE: "It looks like a pickle, whose name should end with `.bin`.",
    b"PK": "It looks like a zip archive: torch.save writes such, and names them `.bin`.",
    b"GGUF": "It is a gguf file of llama.cpp, of other names and layouts: load what it was made from.",
    b"{": "It looks like JSON.",
}
NOT_THERE = ("EntryNotFoundError", "RemoteEntryNotFoundError", "LocalEntryNotFoundError")  # huggingface_hub's
HUB_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only", "repo_type", "proxies")


def find_config(model_id: str | os.PathLike, subfolder: str | None = None, **options: Any) -> Path:
    """Path of the configuration of a saved adapter. Raises `CheckpointError` when there is none."""
    folder = Path(model_id, subfolder or "")
    if not folder.is_dir():
        return _from_hub(model_id, CONFIG_NAME, subfolder, options)
    pending = _pending_config(folder)
    path = pending or folder / CONFIG_NAME
    if not path.is_file():
        what = "a directory, not a file" if path.is_dir() else "missing"
        raise CheckpointError(f"Can't find '{CONFIG_NAME}' at '{folder}': it is {what}.")
    return path


def find_weights(
    model_id: str | os.PathLike, subfolder: str | None = None, use_safetensors: bool | None = None, **options: Any
) -> Path:
    """Path of the weights of a saved adapter: safetensors, or where there are none a pickle (`.bin`).

    `use_safetensors` allows only one of the two.
    """
    folder = Path(model_id, subfolder or "")
    names = {True: [SAFETENSORS_WEIGHTS_NAME], False: [WEIGHTS_NAME]}.get(
        use_safetensors,  # type: ignore[arg-type]
        [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME],
    )
    if not folder.is_dir():
        for name in names[:-1]:
            try:
                return _from_hub(model_id, name, subfolder, options)
            except CheckpointError as error:
                if type(error.__cause__).__name__ not in NOT_THERE:
                    raise
        return _from_hub(model_id, names[-1], subfolder, options)
    for path in (folder / name for name in names):
        if path.is_file():
            return path
        if path.is_dir():
            raise CheckpointError(f"'{path}' is a directory, not a file.")
    raise CheckpointError(f"Can't find '{names[0]}' at '{folder}'.")


def look(path: str | os.PathLike, known: bytes | None = None) -> str:
    """A hint of what a file is that is not what it should be, to stand behind an error message.

    `known`: what such files do begin with, of which nothing is said.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64).lstrip()
    except OSError:
        return ""
    if not head:
        return " It is empty."
    return next((f" {hint}" for start, hint in LOOKS.items() if start != known and head.startswith(start)), "")


def _from_hub(model_id: str | os.PathLike, filename: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    text = os.fspath(model_id)
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", text) or ".." in text:
        raise CheckpointError(f"Can't find '{filename}' at '{Path(text, subfolder or '')}': there is no such folder.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"Can't find '{filename}' at '{text}': there is no such folder, "
            "and to take it for a hub id needs huggingface_hub."
        ) from error
    options = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    try:
        return Path(hf_hub_download(text, filename, subfolder=subfolder, **options))
    except Exception as error:
        where = f"'{text}', neither as a folder nor on the hub"
        raise CheckpointError(f"Can't find '{filename}' at {where}: {error}") from error


# ---------------------------------------------------------------------------------------------------------- writing
def make_folder(folder: str | os.PathLike) -> Path:
    """`folder` as a Path, made when missing. Raises `CheckpointError` when a file stands in its place."""
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"Provided path ({folder}) should be a directory, not a file.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_text(folder: str | os.PathLike, name: str, text: str) -> None:
    """Put `text` into `folder/name` in one step: a reader sees the old file or the new one."""
    folder = make_folder(folder)
    staged = _staged(folder, name, text.encode())
    try:
        _publish(staged, folder / name)
    finally:
        staged.unlink(missing_ok=True)
        for stale in folder.glob(f".{name}.*.tmp"):  # of saves that were killed
            stale.unlink(missing_ok=True)


def write_checkpoint(folder: str | os.PathLike, config: str, weights: Any, safe: bool = True) -> None:
    """Write an adapter: `config` is the JSON text, `weights` maps metadata (dict) to the bytes of the weights file.

    `safe=False` names the weights file as the pickle that it is then.

    A crash, a kill or a full disk at any moment leaves the old checkpoint or the new one. Raises `OSError` when the
    disk refuses, with the old files untouched and no new ones left behind.
    """
    folder = make_folder(folder)
    weights_name = SAFETENSORS_WEIGHTS_NAME if safe else WEIGHTS_NAME
    for name in (CONFIG_NAME, weights_name):
        if (folder / name).is_dir():
            raise CheckpointError(f"'{folder / name}' is a directory, not a file.")
    digest = hashlib.sha256(config.encode()).hexdigest()
    staged: list[Path] = []
    try:
        staged.append(_staged(folder, weights_name, weights({"format": "pt", CONFIG_HASH: digest})))
        staged.append(_staged(folder, CONFIG_NAME, config.encode()))
        pending = folder / f".{CONFIG_NAME}.{digest}"
        os.replace(staged[1], pending)
        staged[1] = pending
        _publish(staged[0], folder / weights_name)  # from here on it is the new checkpoint
        _publish(pending, folder / CONFIG_NAME)
    except BaseException:
        if staged and staged[0].exists():  # not published
            for path in staged:
                path.unlink(missing_ok=True)
        raise
    for name in (CONFIG_NAME, weights_name):  # of saves that were killed
        for stale in folder.glob(f".{name}.*"):
            stale.unlink(missing_ok=True)


def _staged(folder: Path, name: str, data: bytes) -> Path:
    """`data` in a hidden file of `folder`, on the disk for certain."""
    handle, path = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(path, 0o666 & ~umask)  # mkstemp makes it private; a checkpoint is shared like any other file
    except BaseException:
        os.unlink(path)
        raise
    return Path(path)


def _publish(staged: Path, path: Path) -> None:
    os.replace(staged, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def _pending_config(folder: Path) -> Path | None:
    """The configuration that a save did not come to rename, when the weights beside it were written with it."""
    candidates = [p for p in folder.glob(f".{CONFIG_NAME}.*") if not p.name.endswith(".tmp")]
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not candidates or not weights.is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(weights, framework="np") as file:
            digest = (file.metadata() or {}).get(CONFIG_HASH)
    except Exception:
        return None
    return next((path for path in candidates if path.name == f".{CONFIG_NAME}.{digest}"), None)


def saved_at(model_id: str | os.PathLike, subfolder: str | None, **options: Any) -> str | None:
    """The folder with the files of a saved adapter, or None when they are not there."""
    try:
        find_config(model_id, subfolder, **options)
        return str(find_weights(model_id, subfolder, **options).parent)
    except CheckpointError:
        return None
