"""minipeft where its users put it: scripts written for peft, transformers' Trainer, accelerate, and two processes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from .processes import SCRIPTS, close, here, last_line, run
from .scripts import distributed

COMPAT = ("-m", "minipeft.compat")
WAYS = ("one", "ddp", "fsdp2", "accelerate")


@pytest.fixture(autouse=True)
def _installed(ref):
    """These are comparisons with peft, of what runs on transformers."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")


# -------------------------------------------------------------------------------------------------- scripts for peft
@pytest.fixture(scope="module")
def trained_by_peft():
    return here(SCRIPTS / "prompts.py")


def test_script_with_peft_replaced(trained_by_peft):
    """`import peft` finds minipeft."""
    ours = last_line(run(*COMPAT, SCRIPTS / "prompts.py"))
    assert (ours["library"], trained_by_peft["library"]) == ("minipeft", "peft")
    assert len({case["label"] for case in ours["seen"]}) == 10
    close(ours["seen"], trained_by_peft["seen"])


def test_script_with_another_import(trained_by_peft, tmp_path):
    """`import minipeft as peft`, and nothing else changed."""
    source = (SCRIPTS / "prompts.py").read_text()
    assert source.count("import peft\n") == 1
    (tmp_path / "script.py").write_text(source.replace("import peft\n", "import minipeft as peft\n"))
    ours = here(tmp_path / "script.py")
    assert ours["library"] == "minipeft"
    close(ours["seen"], trained_by_peft["seen"])


# ----------------------------------------------------------------------------------------------------------- Trainer
@pytest.fixture(scope="module")
def trainer():
    return last_line(run(*COMPAT, SCRIPTS / "trainer.py", "best", "worst"))


def test_trainer(trainer):
    """The losses are peft's, with the best checkpoint of AdaLoRA, a pruned one, loaded at the end."""
    theirs = here(SCRIPTS / "trainer.py", "best")
    assert (trainer["library"], theirs["library"]) == ("minipeft", "peft")
    close(trainer["seen"][:-1], theirs["seen"])


def test_trainer_resumed(trainer):
    """Resumed from a checkpoint the losses are those of the unbroken run, and the frozen model is as it was."""
    cases = [case for case in trainer["seen"] if "resumed" in case]
    assert len(cases) == 5
    for case in cases:
        assert len(case["losses"]) == 7 and len(set(case["losses"])) == 7
        assert case["resumed"] == pytest.approx(case["losses"], rel=1e-6), case["label"]
        assert case["frozen"], case["label"]


def test_trainer_keeps_a_checkpoint(trainer):
    """Also one from before AdaLoRA pruned, with more ranks than are left. (peft cannot load that.)"""
    best, worst = trainer["seen"][-2:]
    assert best["at"] != worst["at"] and [best["label"], worst["label"]] == ["adalora, best", "adalora, worst"]
    for case in (best, worst):
        assert case["kept"][0] == pytest.approx(case["kept"][1], rel=1e-5)


# ----------------------------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What training in all ways left: a folder for each."""
    folder = tmp_path_factory.mktemp("ways")
    run(SCRIPTS / "distributed.py", "minipeft", folder, *WAYS)
    return folder


@pytest.mark.parametrize("way", WAYS[1:])
def test_two_processes(way, folder, ref):
    """The losses and the saved adapter of one process; peft reads the adapter and computes the same with it."""
    both = folder / "one", folder / way
    losses = [json.loads((each / "losses.json").read_text()) for each in both]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    tensors = [load_file(each / "adapter_model.safetensors") for each in both]
    assert len(tensors[0]) == 2 * (1 + 4) + 2
    torch.testing.assert_close(tensors[1], tensors[0], rtol=1e-4, atol=1e-5)
    ids = distributed.batches()[0]
    outputs = [ref.PeftModel.from_pretrained(distributed.base(), each)(ids) for each in both]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[1], distributed.base()(ids), atol=0.1), "it was trained"


def test_one_process_as_in_peft(folder, tmp_path):
    distributed.train(0, 1, "peft", "one", tmp_path)
    losses = [json.loads((each / "losses.json").read_text()) for each in (folder / "one", tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
