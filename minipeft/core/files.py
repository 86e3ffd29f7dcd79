"""The files of a checkpoint: where they are, and how they are written and read so that no version is ever mixed.

An adapter is two files, `adapter_config.json` and `adapter_model.safetensors` (or `.bin`). What is promised:

- A crash, a kill or a full disk during a save leaves the old checkpoint or the new one, each whole.
- A reader beside a writer gets config and weights of one version. Writers of one folder take turns, where the system
  can lock a folder. An adapter saved twice is the same bytes.
- What is visible counts. A hidden file is read only in the place of the very weights that a killed save left there.

How: both files are written in full under hidden names. The name of the new weights holds the identities (inode, time,
size) of the files that they are for: the new configuration, and the weights that it finds there. Renaming the
configuration then is the one moment at which the new checkpoint takes the old one's place; the weights follow. Whoever
comes between the two renames finds the weights by that name: a reader reads them, the next writer finishes the work. A
reader begins again when a file has become another while it read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .errors import CheckpointError

T = TypeVar("T")
CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
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
LEFT_BEHIND = re.compile(
    r"\.((adapter_config|adapter_model|README)\.[a-z]+\.[\w-]+\.tmp|adapter_model\.[0-9a-f_]+\.(safetensors|bin))"
)
TRIES = 100  # readings of a folder that changes meanwhile


def find_config(model_id: str | os.PathLike, subfolder: str | None = None, **options: Any) -> Path:
    """Path of the configuration of a saved adapter. Raises `CheckpointError` when there is none."""
    folder = Path(model_id, subfolder or "")
    if not folder.is_dir():
        return _from_hub(model_id, CONFIG_NAME, subfolder, options)
    path = folder / CONFIG_NAME
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
    present = _weights_in(folder)
    for path in (present[name] for name in names if name in present):
        if not path.is_file():
            raise CheckpointError(f"'{path}' is {'a directory' if path.is_dir() else 'something else'}, not a file.")
        return path
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


def kept_file(model_id: str | os.PathLike, name: str, revision: str | None = None) -> Path | None:
    """A file of a model that is on this machine, in a folder or in the hub's cache; None for others."""
    if (path := Path(model_id, name)).is_file():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(os.fspath(model_id), name, revision=revision)
    except Exception:  # no such library, no name of a model
        return None
    return Path(found) if isinstance(found, str) else None


def saved_at(model_id: str | os.PathLike, subfolder: str | None, **options: Any) -> str | None:
    """The folder with the files of a saved adapter, or None when they are not there."""
    try:
        find_config(model_id, subfolder, **options)
        return str(find_weights(model_id, subfolder, **options).parent)
    except CheckpointError:
        return None


# ---------------------------------------------------------------------------------------------------------- versions
def of_one_version(model_id: str | os.PathLike, subfolder: str | None, read: Callable[[], T]) -> T:
    """What `read` makes of the files of a saved adapter, all of them from one save.

    It is called again when they were replaced meanwhile. Raises `CheckpointError` when that does not end.
    """
    folder = Path(model_id, subfolder or "")
    for _ in range(TRIES):
        before = _identities(folder)
        try:
            found = read()
        except Exception:
            if _identities(folder) == before:
                raise
        else:
            if _identities(folder) == before:
                return found
    raise CheckpointError(f"The files in '{folder}' are replaced faster than they can be read.")


def _identities(folder: Path) -> list[str]:
    return [_identity(folder / name) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]


def _identity(path: Path) -> str:
    """What tells a file from others of its name, before and after it, and stays when it is renamed; "" for none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    text = f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _weights_in(folder: Path) -> dict[str, Path]:
    """The weights files of the configuration in `folder`, by the names that they have when a save is complete."""
    if pending := _pending(folder):
        return {f"adapter_model{pending.suffix}": pending}
    return {name: folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).exists()}


def _pending(folder: Path) -> Path | None:
    """The weights of the configuration in `folder` that a save has not come to rename, if it is all as it left it."""
    config, *weights = _identities(folder)
    for path in folder.glob(".adapter_model.*.*"):
        made_for, *in_place_of = path.name.split(".")[2].split("_")
        if config == made_for and all(not seen or seen in in_place_of for seen in weights):
            return path
    return None


# ---------------------------------------------------------------------------------------------------------- writing
def make_folder(folder: str | os.PathLike) -> Path:
    """`folder` as a Path, made when missing. Raises `CheckpointError` when a file stands in its place."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(f"Provided path ({folder}) should be a directory, not a file.") from error
    return folder


def write_text(folder: str | os.PathLike, name: str, text: str) -> None:
    """Put `text` into `folder/name` in one step: a reader sees the old file or the new one."""
    with _Writer(make_folder(folder), name) as writer:
        with writer.staged({name: text.encode()}) as (staged,):
            os.replace(staged, writer.folder / name)
        writer.sync()


def write_checkpoint(folder: str | os.PathLike, config: str, weights: bytes, safe: bool = True) -> None:
    """Write an adapter: `config` is the JSON text, `weights` the content of its weights file.

    `safe=False` names the weights file as the pickle that it is then. Weights in the other format, which would not
    belong to this configuration, are removed.

    A crash, a kill or a full disk at any moment leaves the old checkpoint or the new one. Raises `OSError` when the
    disk refuses, with the old files untouched and no new ones left behind.
    """
    name = SAFETENSORS_WEIGHTS_NAME if safe else WEIGHTS_NAME
    with _Writer(make_folder(folder), CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) as writer:
        folder = writer.folder
        with writer.staged({CONFIG_NAME: config.encode(), name: weights}) as staged:
            made_for = "_".join(filter(None, [_identity(staged[0]), *_identities(folder)[1:]]))
            pending = folder / f".adapter_model.{made_for}{Path(name).suffix}"
            os.replace(staged[1], pending)
            staged[1] = pending
            writer.sync()
            os.replace(staged[0], folder / CONFIG_NAME)  # from here on it is the new checkpoint
        writer.sync()
        writer.finish()


class _Writer:
    """Writes files into a folder and, while it is open, keeps other writers out of it where the system can do that.

    What a killed save left is finished at the beginning. Raises `CheckpointError` when one of `names`, the files to be
    written, is a directory, and `PermissionError` when one is read-only.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.names, self.alone = folder, names, False
        self.handle: int | None = None

    def __enter__(self) -> _Writer:
        for path in map(self.folder.joinpath, self.names):
            if path.is_dir():
                raise CheckpointError(f"'{path}' is a directory, not a file.")
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(f"'{path}' is read-only.")
        if os.name == "posix":
            with contextlib.suppress(PermissionError):  # a folder that may be written but not listed
                self.handle = os.open(self.folder, os.O_RDONLY)
        try:
            self._lock()
            self.finish()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        try:
            if self.alone and kind is None:  # nobody else is writing: these are of saves that were killed
                for path in self.folder.glob(".*"):
                    if LEFT_BEHIND.fullmatch(path.name):
                        path.unlink(missing_ok=True)
        finally:
            self._close()

    def _lock(self) -> None:
        if self.handle is not None:
            import fcntl

            with contextlib.suppress(OSError):  # some network file systems cannot
                fcntl.flock(self.handle, fcntl.LOCK_EX)
                self.alone = True

    def _close(self) -> None:
        if self.handle is not None:
            if self.alone:
                import fcntl

                fcntl.flock(self.handle, fcntl.LOCK_UN)  # closing alone would not do where a child was forked meanwhile
            os.close(self.handle)

    @contextlib.contextmanager
    def staged(self, files: dict[str, bytes]) -> Iterator[list[Path]]:
        """Hidden files with that content, on the disk for certain. They go when the first was not renamed in the end.

        A file that takes the place of another will have its permissions.
        """
        paths: list[Path] = []
        try:
            for name, data in files.items():
                paths.append(self.folder / f".{name}.{secrets.token_hex(8)}.tmp")
                with open(paths[-1], "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if (old := self.folder / name).exists():
                    os.chmod(paths[-1], stat.S_IMODE(old.stat().st_mode))
            yield paths
        except BaseException:
            if paths and paths[0].exists():
                for path in paths:
                    path.unlink(missing_ok=True)
            raise

    def finish(self) -> None:
        """Let weights that wait for it take the place that they are for."""
        if pending := _pending(self.folder):
            name = f"adapter_model{pending.suffix}"
            for other in {SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME} - {name}:
                (self.folder / other).unlink(missing_ok=True)
            self.sync()
            with contextlib.suppress(FileNotFoundError):  # another writer was faster
                os.replace(pending, self.folder / name)
            self.sync()

    def sync(self) -> None:
        """Bring renames to the disk."""
        if self.handle is not None:
            os.fsync(self.handle)
