"""Uploading: the adapter goes out, and nothing of the base model. Nothing goes anywhere here."""

import inspect
import sys
from pathlib import Path

import pytest

from . import bases as B
from . import harness as H

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """What would be done on the hub: (method, arguments), and the files that would go up, by name."""
    calls, files, cards = [], {}, {}

    def create_repo(self, repo_id, **options):
        calls.append(("create_repo", repo_id, options))
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, folder_path, **options):
        calls.append(("upload_folder", options.pop("repo_id"), options))
        root = Path(folder_path)
        files.update({str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()})
        return "done"

    def download(self, repo_id, filename, **options):
        if filename not in cards:
            raise hub.errors.EntryNotFoundError("there is none")
        (tmp_path / "card").write_text(cards[filename])
        return str(tmp_path / "card")

    def nothing(self, *args, **options):
        calls.append(("create_branch", args[0] if args else options["repo_id"], options))

    for name, what in {"create_repo": create_repo, "upload_folder": upload_folder, "hf_hub_download": download,
                       "create_branch": nothing}.items():  # fmt: skip
        monkeypatch.setattr(hub.HfApi, name, what)
    for name in ("create_commit", "upload_file"):
        monkeypatch.setattr(hub.HfApi, name, lambda self, *args, **options: pytest.fail("sent something else"))
    return calls, files, cards


CONFIGS = {
    "LoraConfig": {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
    "LNTuningConfig": {"target_modules": ["norm"]},
    "PromptTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PrefixTuningConfig": {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "AdaptionPromptConfig": {"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_adapter(config, lib, is_ref, uploads, tmp_path):
    if is_ref:
        pytest.skip("peft goes through transformers")
    calls, files, _ = uploads
    model = lib.get_peft_model(B.LLAMA.build(), getattr(lib, config)(**CONFIGS[config]))
    tensors, _ = H.saved(model, tmp_path / "here")
    done = model.push_to_hub("me/adapter", commit_message="why", private=True, token="t", tags=["mine"])
    assert done == "done"
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    H.identical(H.safetensors.torch.load(files["adapter_model.safetensors"]), tensors)
    assert "- mine\n" in files["README.md"].decode() and "library_name: peft" in files["README.md"].decode()
    assert calls == [
        ("create_repo", "me/adapter", {"private": True, "token": "t", "exist_ok": True}),
        ("upload_folder", "me/adapter", {"commit_message": "why", "commit_description": None, "token": "t",
                                         "revision": None, "create_pr": False}),
    ]  # fmt: skip


def test_several_adapters_and_the_card_that_is_there(lib, is_ref, uploads):
    if is_ref:
        pytest.skip("peft goes through transformers")
    calls, files, cards = uploads
    cards["README.md"] = "---\nlicense: mit\n---\n# Mine\n\nMy own words.\n"
    model = lib.get_peft_model(B.LLAMA.build(), lib.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", lib.LoraConfig(target_modules=["v_proj"]))
    model.push_to_hub("me/adapter", revision="dev", create_pr=True)
    assert {"adapter_model.safetensors", "other/adapter_model.safetensors"} < set(files)
    card = files["README.md"].decode()
    assert "My own words." in card and "license: mit" in card and "library_name: peft" in card
    assert [name for name, *_ in calls] == ["create_repo", "create_branch", "upload_folder"]
    assert calls[2][2]["revision"] == "dev" and calls[2][2]["create_pr"] is True


def test_refused(lib, is_ref, uploads, monkeypatch):
    """Nothing is made on the hub."""
    if is_ref:
        pytest.skip("peft goes through transformers")
    calls, *_ = uploads
    mixed = lib.get_peft_model(B.LLAMA.build(), lib.LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(lib.errors.UnsupportedFeatureError, match="upload"):
        mixed.push_to_hub("me/adapter")
    model = lib.get_peft_model(B.LLAMA.build(), lib.LoraConfig(target_modules=["q_proj"]))
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "save_pretrained", lambda self, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.push_to_hub("me/adapter")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(lib.errors.UnsupportedFeatureError, match="huggingface_hub"):
        model.push_to_hub("me/adapter")
    assert not calls


def test_takes_what_peft_takes(lib, ref):
    assert list(inspect.signature(lib.PeftModel.push_to_hub).parameters) == list(
        inspect.signature(ref.PeftModel.push_to_hub).parameters
    )


def test_what_is_the_adapted_models_own(lib, ref):
    """Reading, writing and uploading are never those of the base model, which would write other weights."""
    model = lib.get_peft_model(B.LLAMA.build(), lib.LoraConfig(target_modules=["q_proj"]))
    names = ("save_pretrained", "from_pretrained", "push_to_hub", "load_adapter", "add_adapter", "set_adapter",
             "delete_adapter", "generate", "forward", "state_dict", "load_state_dict")  # fmt: skip
    for each in (model, lib.get_peft_model(B.LLAMA.build(), lib.LoraConfig(target_modules=["q_proj"]), mixed=True)):
        for name in names:
            assert getattr(type(each), name, None) is not None, name
