"""A copy of a model computes, trains and saves as the model does: by deepcopy, torch.save, or in another process."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from . import harness as H
from .cases import CASES, each_case
from .processes import ROOT

FIRST = {case.method: case.id for case in reversed(CASES) if case.id.endswith("/plain")}
each_method = each_case(lambda case: case.id in FIRST.values())


@pytest.fixture(autouse=True)
def _not_of_peft(is_ref):
    if is_ref:
        pytest.skip("copies of OSF, adaption prompt and replicated layers differ in peft itself")


def stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "torch.save": stored}


def model_of(case, lib):
    return H.move(H.adapt(lib, case), case.scale)


def computed(model, case):
    """The output and the gradients, from the same draws."""
    H.seed(3)
    output = H.run(model, H.inputs(case))
    H.seed(3)
    return output | H.gradients(model, H.inputs(case))


@pytest.mark.parametrize("way", WAYS)
@each_method
def test_a_copy(case, way, lib, tmp_path):
    model = model_of(case, lib)
    again, before = WAYS[way](model), H.snapshot(model)
    assert type(again) is type(model) and again.peft_config == model.peft_config
    H.identical(H.snapshot(again), before)
    if "running writes" not in case.disputed:
        H.close(computed(again, case), computed(model, case), 1e-6)
    H.identical(H.saved(again, tmp_path / "again")[0], H.saved(model, tmp_path / "model")[0])
    before = H.snapshot(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    if case.prompt:
        again.delete_adapter("default")
    elif case.merges:
        again.merge_and_unload()
    else:
        again.unload()
    H.identical(H.snapshot(model), before)


CHILD = """
import pickle, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
answers, sys.stdout = sys.stdout.buffer, sys.stderr
for size in iter(lambda: sys.stdin.buffer.read(8), b""):
    model, batch = pickle.loads(sys.stdin.buffer.read(int.from_bytes(size, "big")))
    torch.manual_seed(3)
    with torch.no_grad():
        out = (model.base_model if "task_ids" in batch and type(model).__name__ == "PeftModel" else model)(**batch)
    data = pickle.dumps(out if torch.is_tensor(out) else {k: v for k, v in out.items() if torch.is_tensor(v)})
    answers.write(len(data).to_bytes(8, "big") + data)
    answers.flush()
"""


@pytest.fixture(scope="module")
def process():
    """A Python process that has imported neither minipeft nor peft, and what asks it for the output of a model."""
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)

    def ask(*question):
        data = pickle.dumps(question)
        child.stdin.write(len(data).to_bytes(8, "big") + data)
        child.stdin.flush()
        return pickle.loads(child.stdout.read(int.from_bytes(child.stdout.read(8), "big")))

    yield ask
    child.stdin.close()
    child.wait()


@each_method
def test_another_process(case, lib, process):
    """It imports what the model needs by itself."""
    model = model_of(case, lib)
    out = process(model, H.inputs(case))
    H.seed(3)
    H.close(H.tensors(out), H.run(model, H.inputs(case)), 1e-6)


class WithEmbeddings(nn.Module):
    """A model with gradient checkpointing that is none of transformers'."""

    is_gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def get_input_embeddings(self):
        return self.words

    def forward(self, ids):
        return self.head(self.words(ids))


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing(way, lib):
    again = WAYS[way](lib.get_peft_model(WithEmbeddings(), lib.LoraConfig(r=2, target_modules=["head"])))
    assert again.get_input_embeddings()(torch.arange(3)).requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_replicated_layers(way, lib):
    """To unload a copy gives the copy its own layers back, and leaves the original as it is."""
    case = next(case for case in CASES if "layer_replication" in case.kwargs)
    model = H.adapt(lib, case)
    before = [name for name, _ in model.named_modules()]
    plain = WAYS[way](model).unload()
    assert [name for name, _ in model.named_modules()] == before
    H.same_names(plain.state_dict(), case.base.build().state_dict())
