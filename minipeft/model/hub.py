"""Uploading to the Hugging Face hub, through huggingface_hub where that is installed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..core.errors import UnsupportedFeatureError


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
) -> Any:
    """Upload what `save_pretrained` writes, and no weight of the base model, to the repository `repo_id`.

    The repository is made when there is none; a card (README.md) that it has is brought up to date, with `tags`.
    `revision` is the branch to upload to, `create_pr` opens a pull request instead. `max_shard_size` is for code
    written for transformers' models: an adapter is one file. Returns what `huggingface_hub` tells of the commit.

    Raises `UnsupportedFeatureError` without huggingface_hub; nothing goes out when saving fails.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise UnsupportedFeatureError("push_to_hub needs huggingface_hub, which is not installed.") from error
    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder)
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        try:
            card = Path(api.hf_hub_download(repo_id, "README.md", token=token)).read_bytes()
        except EntryNotFoundError:
            card = None  # of a new repository
        if card is not None:
            Path(folder, "README.md").write_bytes(card)
            self.create_or_update_model_card(folder)
        if tags:
            written = huggingface_hub.ModelCard.load(Path(folder, "README.md"))
            written.data.tags = sorted({*(written.data.tags or ()), *tags})
            written.save(Path(folder, "README.md"))
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )
